"""What the search remembers, and who may write it.

Coordinators and workers hold leases with a fencing token: a write carries the token under which it was begun, and counts only while
that is the newest. So a process that was paused, cut off or thought dead can come back at any moment and do no harm. Every method
is one transaction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Row, Select, and_, delete, insert, literal, or_, select, tuple_, update

from autoeff.errors import Conflict, FailureClass, LeaseLost, NotFound, Stale
from autoeff.search.keys import LOCAL
from autoeff.search.storage import leases
from autoeff.search.storage.database import Database, again, insert_absent, storable
from autoeff.search.storage.holders import holder_is_dead
from autoeff.search.storage.records import (
    Attempt,
    Claim,
    Counts,
    Event,
    Job,
    JobState,
    Message,
    Orders,
    Proposal,
    Reply,
    State,
    Trial,
    TrialRef,
    WorkerInfo,
)
from autoeff.search.storage.rows import (
    ATTEMPT,
    COUNTS,
    JOB,
    MEASUREMENT,
    TRIAL,
    attempt_of,
    job_of,
    measurement_of,
    one_of,
    trial_of,
    values_of,
)
from autoeff.search.storage.tables import (
    AttemptRow,
    ConfigurationRow,
    EvaluationRow,
    EventRow,
    HardwareRow,
    IdempotencyRow,
    JobRow,
    MeasurementRow,
    OutboxRow,
    TrialRow,
    WorkerRow,
    now,
)
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.measurements import Measurement

__all__ = ["Store"]

_FORGOTTEN_S = 86_400.0  # a worker that has not been seen for this long
LOG_CHARACTERS = 1 << 20
"""Of an attempt's log the end is kept, where the reason stands; workers send less (`Settings.log_bytes`)."""
_NEXT: Mapping[JobState, frozenset[JobState]] = {
    JobState.PENDING: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.CANCELLING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLING, JobState.CANCELLED}),
    JobState.PAUSED: frozenset({JobState.PENDING, JobState.RUNNING, JobState.CANCELLING, JobState.CANCELLED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.FAILED: frozenset({JobState.PENDING, JobState.RUNNING}),  # a full disk is mended and the job resumed
    JobState.SUCCEEDED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
_RETRIED_AT_ONCE = 200
_STANDING = (JobState.PAUSED, JobState.CANCELLING, JobState.CANCELLED)
"""States in which nothing more is proposed."""


class Store:
    """The database of jobs, trials and their results.

    Safe to share between threads, and to open in any number of processes. A database that fails (full disk, locked for long)
    raises `StorageError`; the transaction under way then did not happen.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, url: str) -> Self:
        """Opens the database at `url`, made where absent. A SQLite file of an older revision is upgraded.

        Args:
            url: Such as `sqlite:////home/me/autoeff.db` or `postgresql+psycopg://me@host/autoeff`.

        Raises:
            InputError: The URL cannot be used: unwritable, no database, of a newer version, or on a server and of an older one.
            StorageError: The server does not answer.
        """
        return cls(Database(url))

    @property
    def database(self) -> Database:
        """For what else is kept there."""
        return self._database

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Jobs

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
    ) -> Job:
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
            begun = {"state": JobState.PENDING, "version": 1, "coordinator_fence": 0, "created_at": now(), "owner": owner, "queue": queue}
            if not insert_absent(connection, JobRow, {"id": job_id, **begun, **content, **zeros}):
                raise Conflict(f"job {job_id!r} exists already; choose another id")
            leases.note(connection, job_id, [("job.created", {})])
            if reply is not None:
                connection.execute(delete(IdempotencyRow).where(IdempotencyRow.expires_at <= now()))
                if not insert_absent(connection, IdempotencyRow, reply.values() | {"expires_at": now() + reply.ttl_s}):
                    raise Conflict(f"the request {reply.idempotency_key!r} has an answer already")
        return self.job(job_id)

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
            row = connection.execute(JOB.where(JobRow.id == job_id)).one_or_none()
        if row is None or owner not in (None, row.owner or LOCAL):
            raise _unknown(job_id)
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
        query = select(JobRow.id).where(JobRow.owner == owner, open_states).limit(number)
        with self._database.read() as connection:
            return len(connection.execute(query).all()) >= number

    def counts(self, job_id: str) -> Counts:
        """The job's counters alone.

        Raises:
            InputError: There is no such job.
        """
        with self._database.read() as connection:
            row = connection.execute(COUNTS.where(JobRow.id == job_id)).one_or_none()
        if row is None:
            raise _unknown(job_id)
        return Counts(*row)

    def set_job_state(
        self, job_id: str, fence: int, state: JobState, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> None:
        """Moves the job to `state`, the one it is in included, and replaces its `result`, the final summary, where given.

        Args:
            job_id: The job.
            fence: The coordinator's.
            state: Where to.
            result: The final summary.
            error: Why it failed, in one line.

        Raises:
            LeaseLost: Another process took over.
            Conflict: The job cannot go from its state to that one.
        """
        with self._database.write() as connection:
            job = _fenced(connection, job_id, fence)
            values: dict[str, Any] = {"error": error}
            if result is not None:
                values["result"] = dict(result)
            _move_job(connection, job_id, job.state, state, values)

    # What its user wants

    def pause(self, job_id: str, version: int | None = None) -> Job:
        """Stops proposing for the job, what runs is finished; a paused one stays so.

        Args:
            job_id: The job.
            version: The one that the caller saw; None for any.

        Raises:
            NotFound: No such job.
            Conflict: It has ended; `Stale` where it is of another version.
        """
        return self._order(job_id, version, JobState.PAUSED, (JobState.PAUSED,))

    def resume(self, job_id: str, version: int | None = None) -> Job:
        """Has a paused or failed job go on; one that does anyway stays as it is. Raises as `pause`."""
        return self._order(job_id, version, JobState.PENDING, (JobState.PENDING, JobState.RUNNING))

    @again
    def cancel(self, job_id: str, version: int | None = None) -> Job:
        """Ends the job: what is queued is dropped, workers hear of it when they renew their leases. Raises as `pause`."""
        self._order(job_id, version, JobState.CANCELLING, (JobState.CANCELLING, JobState.CANCELLED))
        self._sweep(job_id)
        return self.job(job_id)

    def retry_failed(self, job_id: str, classes: Collection[FailureClass] = ()) -> Job:
        """Has the failed and quarantined trials of a job tried again, and the job go on; without such trials nothing happens.

        What failed stays as it is: the trials ask for new work, or share equal work that was done since. Whoever drives the job
        loses its lease, and the next one begins with the trials as they are then.

        Args:
            job_id: The job.
            classes: Of failures; none for all.

        Raises:
            NotFound: No such job.
            Conflict: It has ended, or is being cancelled.
        """
        failed = select(EvaluationRow.id).join(TrialRow, TrialRow.evaluation_id == EvaluationRow.id)
        failed = failed.where(TrialRow.job_id == job_id, EvaluationRow.state.in_((State.FAILED, State.QUARANTINED)))
        if classes:
            accepted = and_(AttemptRow.evaluation_id == EvaluationRow.id, AttemptRow.fence == EvaluationRow.accepted_fence)
            failed = failed.join(AttemptRow, accepted).where(AttemptRow.failure.in_([str(one) for one in classes]))
        with self._database.read() as connection:
            ids = connection.execute(failed.distinct().order_by(EvaluationRow.id)).scalars().all()
        for at in range(0, len(ids), _RETRIED_AT_ONCE):
            self._retry(job_id, ids[at : at + _RETRIED_AT_ONCE])
        job = self.job(job_id)
        if not ids:
            _check_going_on(job_id, job.state)
        return job

    @again
    def _retry(self, job_id: str, evaluation_ids: Sequence[int]) -> None:
        queue = self.job(job_id).queue
        with self._database.write() as connection:
            rows = connection.execute(
                select(EvaluationRow.__table__).where(EvaluationRow.id.in_(evaluation_ids)).order_by(EvaluationRow.id)
            )
            renewed = {old.id: (old.state, *_renewed(connection, old, queue)) for old in rows.all()}
            job = _versioned(connection, job_id, None)
            _check_going_on(job_id, job.state)
            query = select(TrialRow.number, TrialRow.evaluation_id, TrialRow.earlier).where(TrialRow.job_id == job_id)
            asked = connection.execute(query.where(TrialRow.evaluation_id.in_(renewed)).order_by(TrialRow.number)).all()
            events: list[tuple[str, Mapping[str, Any]]] = []
            added: Counter[str] = Counter()
            for number, old, earlier in asked:
                before, new, state = renewed[old]
                again_ = {"evaluation_id": new, "earlier": [*(earlier or ()), old], "told_at": None}
                connection.execute(update(TrialRow).where(TrialRow.job_id == job_id, TrialRow.number == number).values(again_))
                events.append(("trial.retried", {"trial": number}))
                added[before] -= 1
                if state.terminal:
                    events.append((f"trial.{state}", {"trial": number}))
                    added[state] += 1
            if not asked:
                return
            leases.note(connection, job_id, events, added)
            going_on = JobState.RUNNING if job.state is JobState.RUNNING else JobState.PENDING
            driven = {"coordinator": None, "coordinator_until": None, "coordinator_fence": JobRow.coordinator_fence + 1}
            _move_job(connection, job_id, job.state, going_on, {"error": None, **driven})

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
            job = _versioned(connection, job_id, version)
            if job.state.terminal or job.state is JobState.CANCELLING:
                raise Conflict(f"job {job_id!r} is {job.state}; its budget cannot change any more")
            changed = {**(job.budget or job.spec.get("budget") or {}), **budget}
            values = {"budget": changed, "version": JobRow.version + 1}
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(values))
            leases.note(connection, job_id, [("job.budget", changed)])
        return self.job(job_id)

    def _order(self, job_id: str, version: int | None, state: JobState, done: tuple[JobState, ...]) -> Job:
        with self._database.write() as connection:
            job = _versioned(connection, job_id, version)
            if job.state not in done:
                _move_job(connection, job_id, job.state, state, {"error": None})
        return self.job(job_id)

    def _sweep(self, job_id: str) -> None:
        """Drops what is queued for a job that is being cancelled, and ends it when nothing runs for it."""
        query = select(EvaluationRow.id).join(TrialRow, TrialRow.evaluation_id == EvaluationRow.id).order_by(EvaluationRow.id)
        with self._database.read() as connection:
            queued = connection.execute(query.where(TrialRow.job_id == job_id, EvaluationRow.state == State.QUEUED)).scalars().all()
        for evaluation_id in queued:  # each on its own: see `leases` for the order of locks
            with self._database.write() as connection:
                leases.drop(connection, evaluation_id)
        with self._database.write() as connection:
            leases.settle(connection, job_id)

    # The coordinator's lease

    def acquire_coordinator(self, job_id: str, owner: str, ttl_s: float) -> int:
        """Makes `owner` the one process that drives the job, and returns its fence.

        A lease that ended, or whose holder is surely dead or `owner` itself, is taken over; what was begun before is refused from then on.

        Args:
            job_id: The job.
            owner: From `process_identity`.
            ttl_s: Seconds until the lease ends unless renewed.

        Raises:
            NotFound: No such job.
            Conflict: Another process drives it.
        """
        with self._database.write() as connection:
            leased = (JobRow.coordinator_until > now()).label("leased")
            query = select(JobRow.coordinator, JobRow.coordinator_fence, leased).where(JobRow.id == job_id).with_for_update()
            job = connection.execute(query).one_or_none()
            if job is None:
                raise _unknown(job_id)
            if job.leased and job.coordinator != owner and not holder_is_dead(job.coordinator):
                raise Conflict(f"job {job_id!r} is driven by the process {job.coordinator}; stop that one or wait for its end")
            fence: int = job.coordinator_fence + 1
            lease = {"coordinator": owner, "coordinator_until": now() + ttl_s, "coordinator_fence": fence}
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(lease))
            leases.note(connection, job_id, [("job.coordinator", {"owner": owner, "fence": fence})])
        return fence

    def tell(self, job_id: str, fence: int, kind: str, body: Mapping[str, Any]) -> None:
        """Adds an event to the job's story.

        Raises:
            LeaseLost: Another process took over.
        """
        with self._database.write() as connection:
            _fenced(connection, job_id, fence)
            leases.note(connection, job_id, [(kind, body)])

    def renew_coordinator(self, job_id: str, fence: int, ttl_s: float) -> None:
        """Moves the end of the lease to `ttl_s` seconds from now.

        Raises:
            LeaseLost: Another process took over.
        """
        with self._database.write() as connection:
            _fenced(connection, job_id, fence)
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(coordinator_until=now() + ttl_s))

    def orders(self, job_id: str, fence: int) -> Orders:
        """What the user of the job wants now.

        Raises:
            LeaseLost: Another process took over.
        """
        query = select(JobRow.state, JobRow.budget, JobRow.coordinator, JobRow.coordinator_fence).where(JobRow.id == job_id)
        with self._database.read() as connection:
            row = connection.execute(query).one()
        if row.coordinator_fence != fence:
            raise _taken_over(job_id, row.coordinator)
        return Orders(row.state, row.budget)

    def waiting_jobs(self, me: str) -> list[str]:
        """Submitted jobs that are to go on and that no other process drives than `me`, the oldest first."""
        wants = and_(JobRow.queue.is_not(None), JobRow.state.in_((JobState.PENDING, JobState.RUNNING)))
        query = select(JobRow.id, JobRow.coordinator, (JobRow.coordinator_until > now()).label("leased"))
        with self._database.read() as connection:
            rows = connection.execute(query.where(wants).order_by(JobRow.created_at, JobRow.id)).all()
        return [row.id for row in rows if not row.leased or row.coordinator == me or holder_is_dead(row.coordinator)]

    def release_coordinator(self, job_id: str, fence: int) -> None:
        """Ends the lease; nothing happens where it was lost before."""
        free = {"coordinator": None, "coordinator_until": None, "coordinator_fence": fence + 1}
        with self._database.write() as connection:
            connection.execute(update(JobRow).where(JobRow.id == job_id, JobRow.coordinator_fence == fence).values(free))

    # Trials, by the coordinator

    @again
    def propose(
        self,
        job_id: str,
        fence: int,
        proposal: Proposal,
        *,
        told: Iterable[int] = (),
        claim_for: str | None = None,
        ttl_s: float = 0.0,
    ) -> TrialRef:
        """Stores a trial, and the work it needs unless equal work exists.

        Equal work is what this job has already under that key, whatever came of it; otherwise what any job has queued, running or
        succeeded. Another job's failure is tried again.

        Args:
            job_id: The job.
            fence: The coordinator's.
            proposal: The candidate.
            told: Trials whose outcome the sampler has heard since; saves a transaction.
            claim_for: Worker that evaluates at once; saves another.
            ttl_s: Lease of that claim in seconds.

        Raises:
            LeaseLost: Another process took over.
            Conflict: The job is paused or being cancelled.
        """
        with self._database.write() as connection:
            found = _equal_work(connection, job_id, proposal.eval_key)
            job = _fenced(connection, job_id, fence)
            if job.state in _STANDING:
                raise Conflict(f"job {job_id!r} is {job.state}; nothing is proposed for it")
            if proposal.number != job.trials:
                raise ValueError(f"trial numbers are dense: {proposal.number} cannot follow {job.trials} trials")
            evaluation_id, state, repeated = found or _proposed_work(connection, job_id, proposal, job.queue)
            cost = 0.0 if repeated else proposal.cost
            connection.execute(
                insert(TrialRow).values(
                    job_id=job_id,
                    number=proposal.number,
                    evaluation_id=evaluation_id,
                    origin=proposal.origin,
                    label=proposal.label,
                    feasible=proposal.feasible,
                    cost=cost,
                    costs=dict(proposal.costs),
                    sampler_state=None if proposal.sampler_state is None else dict(proposal.sampler_state),
                    created_at=now(),
                )
            )
            _mark_told(connection, job_id, told)
            events = [("trial.proposed", {"trial": proposal.number, "digest": proposal.configuration.digest, "origin": proposal.origin})]
            added: dict[str, float] = {"trials": 1, "cost": cost}
            if state.terminal:
                events.append((f"trial.{state}", {"trial": proposal.number}))
                added[state] = 1
            leases.note(connection, job_id, events, added)
            claim = None if claim_for is None else leases.take(connection, evaluation_id, claim_for, ttl_s)
        return TrialRef(proposal.number, evaluation_id, state if claim is None else State.RUNNING, claim)

    def untold(self, job_id: str) -> list[Trial]:
        """Finished trials whose outcome the sampler has not heard, in the order in which they finished."""
        told = and_(TrialRow.told_at.is_(None), EvaluationRow.state.not_in(leases.OPEN))
        return self._trials(TRIAL.where(TrialRow.job_id == job_id, told).order_by(EvaluationRow.ended_at, TrialRow.number))

    def unfinished(self, job_id: str) -> list[Trial]:
        """Trials that are queued or running, by number."""
        unfinished = and_(TrialRow.told_at.is_(None), EvaluationRow.state.in_(leases.OPEN))
        return self._trials(TRIAL.where(TrialRow.job_id == job_id, unfinished).order_by(TrialRow.number))

    def mark_told(self, job_id: str, fence: int, numbers: Iterable[int]) -> None:
        """Notes that the sampler has heard of these trials.

        Raises:
            LeaseLost: Another process took over.
        """
        with self._database.write() as connection:
            _fenced(connection, job_id, fence)
            _mark_told(connection, job_id, numbers)

    # Evaluations, by workers

    @again
    def claim(self, evaluation_id: int, worker: str, ttl_s: float) -> Claim | None:
        """The right to do this work; None when it is not queued (any more).

        Args:
            evaluation_id: The work.
            worker: From `process_identity`.
            ttl_s: Seconds until the lease ends unless renewed.
        """
        with self._database.write() as connection:
            return leases.take(connection, evaluation_id, worker, ttl_s)

    def job_of_evaluation(self, evaluation_id: int) -> Job:
        """The first job that asked for this work; every other one means the same by it."""
        query = JOB.join(TrialRow, TrialRow.job_id == JobRow.id).where(TrialRow.evaluation_id == evaluation_id)
        with self._database.read() as connection:
            return job_of(connection.execute(query.order_by(JobRow.created_at, JobRow.id).limit(1)).one())

    def renew(self, claim: Claim, ttl_s: float) -> bool:
        """Moves the end of the lease to `ttl_s` seconds from now.

        False when the work should stop: the claim is void, or no job wants the result any more. `release` then puts things right.
        """
        with self._database.write() as connection:
            moved = leases.move(connection, claim.evaluation_id, claim.fence, {"lease_until": now() + ttl_s})
            return moved and leases.wanted(connection, claim.evaluation_id)

    @again
    def complete(self, claim: Claim, measurements: Sequence[Measurement], seconds: float, facts: Mapping[str, Any] | None = None) -> bool:
        """Stores the results; False when the claim was void: they are then kept with the attempt and do not count.

        Args:
            claim: The right to do so.
            measurements: All but the exact costs, which the trial has.
            seconds: Wall time of the evaluation.
            facts: What else is worth knowing about the attempt.

        Raises:
            ValueError: A value is not finite.
        """
        for item in measurements:
            if not math.isfinite(item.value):
                raise ValueError(f"{item.name} is {item.value}; a candidate without a finite value is a failure")
        attempt = {"seconds": seconds, "facts": dict(facts or {})}
        with self._database.write() as connection:
            if not leases.decide(connection, claim.evaluation_id, claim.fence, State.SUCCEEDED, "succeeded", **attempt):
                report = [{"name": item.name} | item.to_json() for item in measurements]
                leases.keep_late(connection, claim, {"measurements": report} | attempt)
                return False
            if measurements:
                connection.execute(insert(MeasurementRow), [values_of(claim.evaluation_id, item) for item in measurements])
            leases.announce(connection, claim.evaluation_id, State.SUCCEEDED, {"seconds": seconds})
            return True

    @again
    def fail(
        self,
        claim: Claim,
        failure: FailureClass,
        message: str,
        log: str = "",
        facts: Mapping[str, Any] | None = None,
        *,
        seconds: float | None = None,
    ) -> bool:
        """Stores that the candidate cannot be measured; False when the claim was void.

        Args:
            claim: The right to do so.
            failure: Any class but `LOST`, which is not the candidate's: see `lost`.
            message: One line for people.
            log: What the evaluation printed; its end is kept.
            facts: What else is worth knowing about the attempt.
            seconds: Wall time of the evaluation.
        """
        if failure is FailureClass.LOST:
            raise ValueError("a lost worker is no failure of the candidate; call lost()")
        attempt = {"failure": str(failure), "message": storable(message), "log": _end(log), "seconds": seconds, "facts": dict(facts or {})}
        with self._database.write() as connection:
            if not leases.decide(connection, claim.evaluation_id, claim.fence, State.FAILED, "failed", **attempt):
                leases.keep_late(connection, claim, attempt)
                return False
            leases.announce(connection, claim.evaluation_id, State.FAILED, {"failure": str(failure)})
            return True

    @again
    def lost(self, claim: Claim, reason: str, log: str = "") -> State:
        """Gives the work back after the runner died of something that is not the candidate's; returns its state from then on.

        It is queued again, or quarantined after the third loss. A void claim changes nothing.
        """
        with self._database.write() as connection:
            leases.lose(connection, claim.evaluation_id, claim.fence, storable(reason), _end(log))
            return connection.execute(select(EvaluationRow.state).where(EvaluationRow.id == claim.evaluation_id)).scalar_one()

    @again
    def release(self, claim: Claim) -> bool:
        """Gives the work back unfinished, on an orderly shutdown: no loss is counted. False when the claim was void.

        What no job wants any more is cancelled instead.
        """
        with self._database.write() as connection:
            leases.lock(connection, claim.evaluation_id)
            if not leases.wanted(connection, claim.evaluation_id):
                state, body = State.CANCELLED, {}
                moved = leases.decide(connection, claim.evaluation_id, claim.fence, state, "cancelled")
            else:
                state, body = State.QUEUED, {"reason": "the worker was asked to stop"}
                moved = leases.give_back(connection, claim.evaluation_id, claim.fence, "released")
            if moved:
                leases.announce(connection, claim.evaluation_id, state, body)
            return moved

    @again
    def reap(self) -> int:
        """Ends the claims of workers whose lease ran out or who are surely dead, as `lost` does; returns how many.

        Jobs whose cancelling was interrupted are cancelled to the end.
        """
        with self._database.read() as connection:
            expired = leases.expired(connection)
            cancelling = connection.execute(select(JobRow.id).where(JobRow.state == JobState.CANCELLING)).scalars().all()
        for job_id in cancelling:
            self._sweep(job_id)
        ended = 0
        for evaluation_id, fence, worker in expired:
            with self._database.write() as connection:
                ended += leases.lose(connection, evaluation_id, fence, f"no sign of life from worker {worker}", "")
        return ended

    # Messages to workers

    def waiting(self, queues: Iterable[str], limit: int = 1) -> list[int]:
        """Evaluations that are queued for a worker of these queues, the oldest first."""
        query = select(OutboxRow.evaluation_id).where(OutboxRow.queue.in_(tuple(queues)))
        with self._database.read() as connection:
            return list(connection.execute(query.order_by(OutboxRow.evaluation_id).limit(limit)).scalars())

    def due(self, again_s: float, limit: int = 500) -> list[Message]:
        """Messages that are to be sent now; each is due again `again_s` seconds later, unless its evaluation is claimed."""
        is_due = OutboxRow.not_before <= now()
        with self._database.read() as connection:
            if connection.execute(select(OutboxRow.evaluation_id).where(is_due).limit(1)).first() is None:
                return []
        with self._database.write() as connection:
            query = select(OutboxRow.evaluation_id, OutboxRow.queue, OutboxRow.sent).where(is_due)
            rows = connection.execute(query.order_by(OutboxRow.evaluation_id).limit(limit).with_for_update(skip_locked=True)).all()
            sent = OutboxRow.evaluation_id.in_([row.evaluation_id for row in rows])
            connection.execute(update(OutboxRow).where(sent).values(not_before=now() + again_s, sent=OutboxRow.sent + 1))
        return [Message(*row) for row in rows]

    # Workers

    def announce_worker(self, worker: str, queues: Sequence[str], kind: str, facts: Mapping[str, Any], ttl_s: float) -> None:
        """Notes that a worker takes evaluations of these queues, for `ttl_s` seconds unless it is seen again.

        Args:
            worker: From `process_identity`.
            queues: That it listens to.
            kind: Of its device, as in `gpu.KIND`.
            facts: What else is to be known of its machine; equal facts are one row.
            ttl_s: As above.
        """
        fingerprint = digest_of([kind, facts])
        row = {"id": worker, "queues": list(queues), "started_at": now(), "seen_until": now() + ttl_s}
        with self._database.write() as connection:
            insert_absent(connection, HardwareRow, {"fingerprint": fingerprint, "kind": kind, "facts": dict(facts), "created_at": now()})
            hardware = select(HardwareRow.id).where(HardwareRow.fingerprint == fingerprint).scalar_subquery()
            connection.execute(delete(WorkerRow).where(or_(WorkerRow.id == worker, WorkerRow.seen_until < now() - _FORGOTTEN_S)))
            connection.execute(insert(WorkerRow).values(hardware_id=hardware, **row))

    def worker_seen(self, worker: str, ttl_s: float) -> None:
        """Notes that the worker is alive; with `ttl_s` 0, that it has ended."""
        with self._database.write() as connection:
            connection.execute(update(WorkerRow).where(WorkerRow.id == worker).values(seen_until=now() + ttl_s))

    def workers(self) -> list[WorkerInfo]:
        """Workers of the last day, the newest first."""
        alive = (WorkerRow.seen_until > now()).label("alive")
        columns = WorkerRow.id, WorkerRow.queues, HardwareRow.kind, HardwareRow.facts, WorkerRow.started_at, WorkerRow.seen_until, alive
        query = select(*columns).join(HardwareRow, HardwareRow.id == WorkerRow.hardware_id).order_by(WorkerRow.started_at.desc())
        busy = select(EvaluationRow.worker, EvaluationRow.id).where(EvaluationRow.state == leases.RUNNING)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            at = {row.worker: row.id for row in connection.execute(busy)}
        return [
            WorkerInfo(
                id=row.id,
                queues=row.queues,
                kind=row.kind,
                facts=row.facts,
                started_at=row.started_at,
                seen_until=row.seen_until,
                alive=row.alive and not holder_is_dead(row.id),
                evaluation_id=at.get(row.id),
            )
            for row in rows
        ]

    # Reading

    def trial(self, job_id: str, number: int) -> Trial:
        """One trial.

        Raises:
            NotFound: There is no such job or trial.
        """
        found = self._trials(TRIAL.where(TrialRow.job_id == job_id, TrialRow.number == number))
        if not found:
            raise NotFound(f"job {job_id!r} has no trial {number}; it has {self.counts(job_id).trials}, counted from 0")
        return found[0]

    def trials(
        self, job_id: str, after: int = -1, limit: int = 500, *, states: Iterable[State] | None = None, origin: str | None = None
    ) -> list[Trial]:
        """The next `limit` trials by number, following the trial `after`, the last of the page before.

        Args:
            job_id: The job.
            after: Number of a trial.
            limit: Of the page.
            states: Which; None for all.
            origin: Which; None for all.
        """
        query = TRIAL.where(TrialRow.number > after).order_by(TrialRow.number).limit(limit)
        wanted = None if states is None else frozenset(states)
        if wanted is None or State.SUCCEEDED in wanted:
            query = query.where(TrialRow.job_id == job_id)
        else:
            written = [literal(state, EvaluationRow.state.type, literal_execute=True) for state in (State.SUCCEEDED, *wanted)]
            rare = select(EvaluationRow.id).where(EvaluationRow.state != written[0], EvaluationRow.state.in_(written[1:]))
            query = query.where(TrialRow.evaluation_id.in_(rare), one_of(job_id))
        if wanted is not None:
            query = query.where(EvaluationRow.state.in_(tuple(wanted)))
        if origin is not None:
            query = query.where(TrialRow.origin == origin)
        return self._trials(query)

    def numbered(self, job_id: str, numbers: Iterable[int]) -> list[Trial]:
        """These trials of a job, by number."""
        these = TrialRow.number.in_(sorted(set(numbers)))
        return self._trials(TRIAL.where(TrialRow.job_id == job_id, these).order_by(TrialRow.number))

    def of_keys(self, job_id: str, eval_keys: Iterable[str]) -> list[Trial]:
        """The trials of a job behind which stands the work of one of these keys, by number."""
        with self._database.read() as connection:
            ids = connection.execute(select(EvaluationRow.id).where(EvaluationRow.eval_key.in_(tuple(eval_keys)))).scalars().all()
        if not ids:
            return []
        these = TrialRow.evaluation_id.in_(ids)
        return self._trials(TRIAL.where(one_of(job_id), these).order_by(TrialRow.number))

    def attempts(self, *evaluation_ids: int) -> list[Attempt]:
        """Every try at these evaluations with its log, the first one first."""
        query = ATTEMPT.where(EvaluationRow.id.in_(evaluation_ids)).order_by(EvaluationRow.id, AttemptRow.fence)
        with self._database.read() as connection:
            return [attempt_of(row) for row in connection.execute(query)]

    def events(self, job_id: str, after: int = 0, limit: int = 500) -> list[Event]:
        """The next `limit` events of the job with a `seq` above `after`; the first event has 1."""
        query = select(EventRow.seq, EventRow.kind, EventRow.body, EventRow.created_at)
        query = query.where(EventRow.job_id == job_id, EventRow.seq > after).order_by(EventRow.seq).limit(limit)
        with self._database.read() as connection:
            return [Event(*row) for row in connection.execute(query)]

    def last_events(self, job_ids: Iterable[str]) -> dict[str, int]:
        """The `seq` of the last event of each of these jobs: tells with one query which have news."""
        query = select(JobRow.id, JobRow.events).where(JobRow.id.in_(tuple(job_ids)))
        with self._database.read() as connection:
            return {row.id: row.events for row in connection.execute(query)}

    def _trials(self, query: Select[Any]) -> list[Trial]:
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            ids = {row.evaluation_id for row in rows}
            of_these = MEASUREMENT.where(MeasurementRow.evaluation_id.in_(ids)).order_by(MeasurementRow.evaluation_id, MeasurementRow.name)
            found = connection.execute(of_these).all()
        measured = {key: [measurement_of(item) for item in group] for key, group in groupby(found, lambda item: item.evaluation_id)}
        return [trial_of(row, measured.get(row.evaluation_id, [])) for row in rows]


def _unknown(job_id: str) -> NotFound:
    return NotFound(f"this database has no job {job_id!r}; `autoeff ls` shows those it has")


def _taken_over(job_id: str, coordinator: str | None) -> LeaseLost:
    return LeaseLost(f"job {job_id!r} is no longer driven by this process but by {coordinator or 'none'}; nothing was written")


def _end(log: str) -> str:
    return storable(log[-LOG_CHARACTERS:])


def _fenced(connection: Connection, job_id: str, fence: int) -> Row[JobState, int, str | None, int, str | None]:
    """The job, locked for this transaction, once `fence` is seen to be its newest."""
    query = select(JobRow.state, JobRow.trials, JobRow.coordinator, JobRow.coordinator_fence, JobRow.queue)
    row = connection.execute(query.where(JobRow.id == job_id).with_for_update()).one_or_none()
    if row is None:
        raise _unknown(job_id)
    if row.coordinator_fence != fence:
        raise _taken_over(job_id, row.coordinator)
    return row


def _versioned(connection: Connection, job_id: str, version: int | None) -> Row[JobState, int, Any, Any]:
    """The job, locked for this transaction, once it is seen to be of that version."""
    query = select(JobRow.state, JobRow.version, JobRow.budget, JobRow.spec)
    row = connection.execute(query.where(JobRow.id == job_id).with_for_update()).one_or_none()
    if row is None:
        raise _unknown(job_id)
    if version not in (None, row.version):
        raise Stale(f"job {job_id!r} is of version {row.version}, not {version}; look at it again")
    return row


def _move_job(connection: Connection, job_id: str, before: JobState, state: JobState, values: Mapping[str, Any]) -> None:
    if state is not before and state not in _NEXT[before]:
        raise Conflict(f"job {job_id!r} is {before} and cannot become {state}")
    moved = {"state": state, "ended_at": now() if state.terminal else None, "version": JobRow.version + 1}
    connection.execute(update(JobRow).where(JobRow.id == job_id).values(moved | dict(values)))
    if state is not before:
        said = {"message": values["error"]} if values.get("error") else {}
        leases.note(connection, job_id, [(f"job.{state}", said)])


def _check_going_on(job_id: str, state: JobState) -> None:
    if state is JobState.CANCELLING or (state.terminal and state is not JobState.FAILED):
        raise Conflict(f"job {job_id!r} is {state}; submit it again: what was measured counts there too, and what failed is tried again")


def _renewed(connection: Connection, old: Row[Any], queue: str | None) -> tuple[int, State]:
    """Work in place of some that failed: equal work that was begun since, or new work; its id and state."""
    flying = and_(EvaluationRow.eval_key == old.eval_key, EvaluationRow.state.in_((*leases.OPEN, State.SUCCEEDED)))
    work = {name: getattr(old, name) for name in ("configuration", "eval_key", "split", "windows")}
    while True:
        row = connection.execute(select(EvaluationRow.id, EvaluationRow.state).where(flying).with_for_update()).one_or_none()
        if row is not None:
            return row.id, row.state
        if (new := _queued(connection, work, queue)) is not None:
            return new, State.QUEUED


def _equal_work(connection: Connection, job_id: str, eval_key: str) -> tuple[int, State, bool] | None:
    """The work of this key that a trial of the job can share: its id, its state, and whether this job had asked for it before."""
    own = select(TrialRow.number).where(TrialRow.evaluation_id == EvaluationRow.id, TrialRow.job_id == job_id).exists()
    reusable = or_(own, EvaluationRow.state.in_((*leases.OPEN, State.SUCCEEDED)))
    query = select(EvaluationRow.id, EvaluationRow.state, own.label("own")).where(EvaluationRow.eval_key == eval_key, reusable)
    # Locked, or it could end between this look and the insertion of the trial, which would then never hear of it.
    row = connection.execute(query.order_by(own.desc(), EvaluationRow.id.desc()).limit(1).with_for_update()).one_or_none()
    return None if row is None else (row.id, row.state, row.own)


def _proposed_work(connection: Connection, job_id: str, proposal: Proposal, queue: str | None) -> tuple[int, State, bool]:
    """As `_equal_work`, for a proposal that had none."""
    digest = proposal.configuration.digest
    insert_absent(connection, ConfigurationRow, {"digest": digest, "canonical": proposal.configuration.canonical})
    work = {"configuration": digest, "eval_key": proposal.eval_key, "split": proposal.split, "windows": proposal.windows}
    if (new := _queued(connection, work, queue)) is not None:
        return new, State.QUEUED, False
    found = _equal_work(connection, job_id, proposal.eval_key)
    assert found is not None
    return found


def _queued(connection: Connection, work: Mapping[str, Any], queue: str | None) -> int | None:
    """The id of new work; None where another job's coordinator was faster."""
    begun = {"state": State.QUEUED, "queue": queue, "attempts": 0, "losses": 0, "fence": 0, "created_at": now()}
    inserted = insert_absent(connection, EvaluationRow, {**work, **begun})
    if inserted is None:
        return None
    if queue is not None:
        leases.ring(connection, inserted[0], queue)
    return int(inserted[0])


def _mark_told(connection: Connection, job_id: str, numbers: Iterable[int]) -> None:
    if numbers := list(numbers):
        mine = and_(TrialRow.job_id == job_id, TrialRow.number.in_(numbers), TrialRow.told_at.is_(None))
        connection.execute(update(TrialRow).where(mine).values(told_at=now()))
