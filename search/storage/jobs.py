"""Jobs: what is stored of them, what their users order, what happened to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, bindparam, delete, or_, select, tuple_, update

from autoeff.errors import Conflict, LeaseLost, NotFound, Stale
from autoeff.search.keys import LOCAL
from autoeff.search.storage import leases
from autoeff.search.storage.database import Database, again, insert_absent
from autoeff.search.storage.records import Counts, Event, Job, JobState, Reply, State
from autoeff.search.storage.rows import COUNTS, JOB, job_of, one_of, written
from autoeff.search.storage.tables import EvaluationRow, EventRow, IdempotencyRow, JobRow, TrialRow, now

__all__ = ["Jobs", "fenced", "move_job", "taken_over", "unknown", "versioned"]

_NEXT: Mapping[JobState, frozenset[JobState]] = {
    # One that was paused and resumed before its coordinator looked is pending, and may end so.
    JobState.PENDING: frozenset(set(JobState) - {JobState.PENDING}),
    JobState.RUNNING: frozenset({JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLING, JobState.CANCELLED}),
    JobState.PAUSED: frozenset({JobState.PENDING, JobState.RUNNING, JobState.CANCELLING, JobState.CANCELLED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.FAILED: frozenset({JobState.PENDING, JobState.RUNNING}),  # a full disk is mended and the job resumed
    JobState.SUCCEEDED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

_GOING_ON = (JobState.PENDING, JobState.RUNNING)
_JOB = JOB.where(JobRow.id == bindparam("of"))
_FENCED = select(JobRow.state, JobRow.trials, JobRow.coordinator, JobRow.coordinator_fence, JobRow.queue)
_FENCED = _FENCED.where(JobRow.id == bindparam("of")).with_for_update()
_EVENTS = select(EventRow.seq, EventRow.kind, EventRow.body, EventRow.created_at)
_EVENTS = _EVENTS.where(EventRow.job_id == bindparam("of"), EventRow.seq > bindparam("after"))
_EVENTS = _EVENTS.order_by(EventRow.seq).limit(bindparam("most"))


class Jobs:
    """The jobs of a database.

    Args:
        database: Open.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create_job(
        self,
        job_id: str,
        spec: Mapping[str, Any],
        preflight: Mapping[str, Any],
        space: Mapping[str, Any],
        setup_digest: str,
        *,
        owner: str | None = None,
        queue: str | None = None,
        reply: Reply | None = None,
    ) -> None:
        """Adds a pending job.

        Args:
            job_id: Of the job.
            spec: The validated `JobSpec` as JSON.
            preflight: What is known before the first evaluation.
            space: The search space as JSON.
            setup_digest: Names what the results depend on besides the configuration.
            owner: Who submitted it to a server.
            queue: Workers that evaluate it; None where this process does.
            reply: Answer to be given again to the same request, stored with the job or not at all.

        Raises:
            Conflict: There is a job of this id, or an answer to that request.
        """
        with self._database.write() as connection:
            zeros = {"trials": 0, "succeeded": 0, "failed": 0, "quarantined": 0, "cancelled": 0, "cost": 0.0, "events": 0}
            content = {"spec": dict(spec), "preflight": dict(preflight), "space": dict(space), "setup_digest": setup_digest}
            begun = {"state": JobState.PENDING, "version": 1, "coordinator_fence": 0, "owner": owner, "queue": queue}
            if not insert_absent(connection, JobRow, {"id": job_id, **begun, **content, **zeros}, stamped="created_at"):
                raise Conflict(f"job {job_id!r} exists already; choose another id")
            leases.note(connection, job_id, [("job.created", {})])
            if reply is not None:
                connection.execute(delete(IdempotencyRow).where(IdempotencyRow.expires_at <= now()))
                if not insert_absent(connection, IdempotencyRow, reply.values(), stamped="expires_at", after_s=reply.ttl_s):
                    raise Conflict(f"the request {reply.idempotency_key!r} has an answer already")

    def job(self, job_id: str, owner: str | None = None) -> Job:
        """The job of this id.

        Args:
            job_id: Of the job.
            owner: Where given, a job of somebody else is as unknown as one that does not exist. Those without an owner, begun without
                a server, are the jobs of `LOCAL`.

        Raises:
            NotFound: There is none.
        """
        with self._database.read() as connection:
            row = connection.execute(_JOB, {"of": job_id}).one_or_none()
        if row is None or owner not in (None, row.owner or LOCAL):
            raise unknown(job_id)
        return job_of(row)

    def jobs(
        self, limit: int = 100, before: str | None = None, *, owner: str | None = None, states: Iterable[JobState] | None = None
    ) -> list[Job]:
        """The newest `limit` jobs; of those older than the job `before`, the last of the page before, where that is given.

        Args:
            limit: Of the page.
            before: Id of a job.
            owner: Whose jobs; None for everybody's.
            states: Which; None for all.
        """
        query = JOB.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(or_(JobRow.owner == owner, JobRow.owner.is_(None)) if owner == LOCAL else JobRow.owner == owner)
        if states is not None:
            query = query.where(JobRow.state.in_(tuple(states)))
        if before is not None:
            last = select(JobRow.created_at).where(JobRow.id == before).scalar_subquery()
            query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(last, before))
        with self._database.read() as connection:
            return [job_of(row) for row in connection.execute(query)]

    def has_open_jobs(self, owner: str, number: int) -> bool:
        """Whether so many jobs of an owner have not ended."""
        open_states = JobRow.state.in_([state for state in JobState if not state.terminal])
        query = select(JobRow.id).where(JobRow.owner == owner, open_states).offset(number - 1).limit(1)
        with self._database.read() as connection:
            return connection.execute(query).first() is not None

    def counts(self, job_id: str) -> Counts:
        """The job's counters alone.

        Raises:
            InputError: There is no such job.
        """
        with self._database.read() as connection:
            row = connection.execute(COUNTS.where(JobRow.id == job_id)).one_or_none()
        if row is None:
            raise unknown(job_id)
        return Counts(*row)

    @again
    def set_job_state(
        self,
        job_id: str,
        fence: int,
        state: JobState,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
        *,
        only_from: Collection[JobState] = tuple(JobState),
    ) -> None:
        """Moves the job to `state`, the one it is in included, and replaces its `result`, the final summary, where given.

        Args:
            job_id: The job.
            fence: The coordinator's.
            state: Where to.
            result: The final summary.
            error: Why it failed, in one line.
            only_from: States that it may be in.

        Raises:
            LeaseLost: Another process took over.
            Conflict: The job cannot go from its state to that one.
        """
        with self._database.write() as connection:
            job = fenced(connection, job_id, fence)
            if job.state not in only_from:
                raise Conflict(f"job {job_id!r} is {job.state}")
            values: dict[str, Any] = {"error": error}
            if result is not None:
                values["result"] = dict(result)
            move_job(connection, job_id, job.state, state, values)

    def events(self, job_id: str, after: int = 0, limit: int = 500) -> list[Event]:
        """The next `limit` events of the job with a `seq` above `after`; the first event has 1."""
        with self._database.read() as connection:
            return [Event(*row) for row in connection.execute(_EVENTS, {"of": job_id, "after": after, "most": limit})]

    def heads(self, job_ids: Iterable[str]) -> dict[str, tuple[JobState, int]]:
        """The state of each of these jobs and the `seq` of its last event: tells with one query which have news."""
        query = select(JobRow.id, JobRow.state, JobRow.events).where(JobRow.id.in_(tuple(job_ids)))
        with self._database.read() as connection:
            return {row.id: (row.state, row.events) for row in connection.execute(query)}

    @again
    def pause(self, job_id: str, version: int | None = None, *, at_once: bool = False) -> Job:
        """Stops proposing for the job; a paused one stays so.

        Args:
            job_id: The job.
            version: The one that the caller saw; None for any.
            at_once: What was proposed is not finished, but given back, and waits until the job goes on.

        Raises:
            NotFound: No such job.
            Conflict: It has ended; `Stale` where it is of another version.
        """
        job = self._order(job_id, version, JobState.PAUSED, (JobState.PAUSED,))
        for evaluation_id in self._asked_for(job_id, *leases.OPEN) if at_once else ():  # each on its own, as in `_sweep`
            with self._database.write() as connection:
                leases.set_aside(connection, evaluation_id)
        return self.job(job_id) if at_once else job

    @again
    def resume(self, job_id: str, version: int | None = None) -> Job:
        """Has a paused or failed job go on; one that does anyway stays as it is. Raises as `pause`."""
        return self._order(job_id, version, JobState.PENDING, (JobState.PENDING, JobState.RUNNING))

    @again
    def cancel(self, job_id: str, version: int | None = None) -> Job:
        """Ends the job: what is queued is dropped, workers hear of it when they renew their leases. Raises as `pause`."""
        self._order(job_id, version, JobState.CANCELLING, (JobState.CANCELLING, JobState.CANCELLED))
        self._sweep(job_id)
        return self.job(job_id)

    def change_budget(self, job_id: str, budget: Mapping[str, Any], version: int) -> Job:
        """Replaces trials or seconds of a job that has not ended.

        Args:
            job_id: The job.
            budget: `trials`, `seconds` or both.
            version: The one that the caller saw.

        Raises:
            NotFound: No such job.
            Conflict: It has ended; `Stale` where it is of another version.
        """
        with self._database.write() as connection:
            job = versioned(connection, job_id, version)
            if job.state.terminal or job.state is JobState.CANCELLING:
                raise Conflict(f"job {job_id!r} is {job.state}; its budget cannot change any more")
            changed = {**(job.budget or job.spec.get("budget") or {}), **budget}
            values = {"budget": changed, "version": JobRow.version + 1}
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(values))
            leases.note(connection, job_id, [("job.budget", changed)])
        return self.job(job_id)

    def _order(self, job_id: str, version: int | None, state: JobState, done: tuple[JobState, ...]) -> Job:
        with self._database.write() as connection:
            job = versioned(connection, job_id, version)
            if job.state not in done:
                move_job(connection, job_id, job.state, state, {"error": None})
        return self.job(job_id)

    def _sweep(self, job_id: str) -> None:
        """Drops what is queued for a job that is being cancelled, and ends it when nothing runs for it."""
        for evaluation_id in self._asked_for(job_id, State.QUEUED):  # each on its own: see `leases` for the order of locks
            with self._database.write() as connection:
                leases.drop(connection, evaluation_id)
        with self._database.write() as connection:
            leases.settle(connection, job_id)

    def _asked_for(self, job_id: str, *states: State) -> Sequence[int]:
        """Evaluations in these states, which few are in, that trials of the job ask for."""
        with self._database.read() as connection:
            return [row.id for row in connection.execute(asked_for(job_id, *states))]


def asked_for(job_id: str, *states: State) -> Select[int, str | None]:
    """Id and queue of evaluations in these states, which few are in, that trials of the job ask for."""
    rare = and_(EvaluationRow.state != written(State.SUCCEEDED), EvaluationRow.state.in_([written(state) for state in states]))
    query = select(EvaluationRow.id, EvaluationRow.queue).join(TrialRow, TrialRow.evaluation_id == EvaluationRow.id)
    return query.where(rare, one_of(job_id)).distinct().order_by(EvaluationRow.id)


def unknown(job_id: str) -> NotFound:
    """That there is no such job."""
    return NotFound(f"this database has no job {job_id!r}; `autoeff ls` shows those it has")


def taken_over(job_id: str, coordinator: str | None) -> LeaseLost:
    """That another coordinator holds the lease."""
    return LeaseLost(f"job {job_id!r} is no longer driven by this process but by {coordinator or 'none'}; nothing was written")


def fenced(connection: Connection, job_id: str, fence: int) -> Row[JobState, int, str | None, int, str | None]:
    """The job, locked for this transaction, once `fence` is seen to be its newest."""
    row = connection.execute(_FENCED, {"of": job_id}).one_or_none()
    if row is None:
        raise unknown(job_id)
    if row.coordinator_fence != fence:
        raise taken_over(job_id, row.coordinator)
    return row


def versioned(connection: Connection, job_id: str, version: int | None) -> Row[JobState, int, Any, Any]:
    """The job, locked for this transaction, once it is seen to be of that version."""
    query = select(JobRow.state, JobRow.version, JobRow.budget, JobRow.spec)
    row = connection.execute(query.where(JobRow.id == job_id).with_for_update()).one_or_none()
    if row is None:
        raise unknown(job_id)
    if version not in (None, row.version):
        raise Stale(f"job {job_id!r} is of version {row.version}, not {version}; look at it again")
    return row


def move_job(connection: Connection, job_id: str, before: JobState, state: JobState, values: Mapping[str, Any]) -> None:
    """Moves a locked job to a state that it may go to, or leaves it in its own, and writes these values."""
    if state is not before and state not in _NEXT[before]:
        raise Conflict(f"job {job_id!r} is {before} and cannot become {state}")
    moved = {"state": state, "ended_at": now() if state.terminal else None, "version": JobRow.version + 1}
    connection.execute(update(JobRow).where(JobRow.id == job_id).values(moved | dict(values)))
    if before not in _GOING_ON and state in _GOING_ON:
        for evaluation_id, queue in connection.execute(asked_for(job_id, State.QUEUED)).all():  # they may have been set aside
            leases.ring(connection, evaluation_id, queue)
    if state is not before:
        said = {"message": values["error"]} if values.get("error") else {}
        leases.note(connection, job_id, [(f"job.{state}", said)])
