"""What the search remembers, and who may write it.

Coordinators and workers hold leases with a fencing token: a write carries the token under which it was begun, and counts only while
that is the newest. So a process that was paused, cut off or thought dead can come back at any moment and do no harm. Every method
is one transaction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Row, Select, and_, insert, or_, select, tuple_, update

from autoeff.errors import FailureClass, InputError, LeaseLost
from autoeff.search.storage import leases
from autoeff.search.storage.database import Database
from autoeff.search.storage.holders import holder_is_dead
from autoeff.search.storage.records import Attempt, Claim, Counts, Event, Job, JobState, Proposal, State, Trial, TrialRef
from autoeff.search.storage.rows import ATTEMPT, COUNTS, JOB, MEASUREMENT, TRIAL, attempt_of, job_of, measurement_of, trial_of, values_of
from autoeff.search.storage.tables import AttemptRow, ConfigurationRow, EvaluationRow, EventRow, JobRow, MeasurementRow, TrialRow, now
from autoeff.spaces.measurements import Measurement

__all__ = ["Store"]

LOG_CHARACTERS = 65_536
"""Of an attempt's log the end is kept; that is where the reason stands."""
_NEXT: Mapping[JobState, frozenset[JobState]] = {
    JobState.PENDING: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.PAUSED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.FAILED: frozenset({JobState.RUNNING}),  # a full disk is mended and the job resumed
    JobState.SUCCEEDED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class Store:
    """The database of jobs, trials and their results.

    Safe to share between threads, and to open in any number of processes. A database that fails (full disk, locked for long)
    raises `AutoeffError`; the transaction under way then did not happen.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, url: str) -> Self:
        """Opens the database at `url`, made where absent and upgraded where of an older revision.

        Args:
            url: Such as `sqlite:////home/me/autoeff.db`.

        Raises:
            InputError: The URL cannot be used: unwritable, no database, or of a newer version.
        """
        return cls(Database(url))

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Jobs

    def create_job(
        self, job_id: str, spec: Mapping[str, Any], preflight: Mapping[str, Any], space: Mapping[str, Any], setup_digest: str
    ) -> None:
        """Adds a pending job.

        Raises:
            InputError: There is a job of this id.
        """
        with self._database.write() as connection:
            if connection.execute(select(JobRow.id).where(JobRow.id == job_id)).first():
                raise InputError(f"job {job_id!r} exists already; choose another id")
            zeros = {"coordinator_fence": 0, "trials": 0, "succeeded": 0, "failed": 0, "quarantined": 0, "cost": 0.0, "events": 0}
            content = {"spec": dict(spec), "preflight": dict(preflight), "space": dict(space), "setup_digest": setup_digest}
            connection.execute(insert(JobRow).values(id=job_id, state=JobState.PENDING, created_at=now(), **content, **zeros))
            leases.note(connection, job_id, [("job.created", {})])

    def job(self, job_id: str) -> Job:
        """The job of this id.

        Raises:
            InputError: There is none.
        """
        with self._database.read() as connection:
            row = connection.execute(JOB.where(JobRow.id == job_id)).one_or_none()
        if row is None:
            raise _unknown(job_id)
        return job_of(row)

    def jobs(self, limit: int = 100, before: str | None = None) -> list[Job]:
        """The newest `limit` jobs; of those older than the job `before`, the last of the page before, where that is given."""
        query = JOB.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
        if before is not None:
            last = select(JobRow.created_at).where(JobRow.id == before).scalar_subquery()
            query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(last, before))
        with self._database.read() as connection:
            return [job_of(row) for row in connection.execute(query)]

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

    def set_job_state(self, job_id: str, fence: int, state: JobState, result: Mapping[str, Any] | None = None) -> None:
        """Moves the job to `state`, the one it is in included, and replaces its `result`, the final summary, where given.

        Raises:
            LeaseLost: Another process took over.
            InputError: The job cannot go from its state to that one.
        """
        with self._database.write() as connection:
            job = _fenced(connection, job_id, fence)
            if state is not job.state and state not in _NEXT[job.state]:
                raise InputError(f"job {job_id!r} is {job.state} and cannot become {state}")
            values: dict[str, Any] = {"state": state, "ended_at": now() if state.terminal else None}
            if result is not None:
                values["result"] = dict(result)
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(values))
            if state is not job.state:
                leases.note(connection, job_id, [(f"job.{state}", {})])

    # The coordinator's lease

    def acquire_coordinator(self, job_id: str, owner: str, ttl_s: float) -> int:
        """Makes `owner` the one process that drives the job, and returns its fence.

        A lease that ended, or whose holder is surely dead, is taken over; the former holder's writes are refused from then on.

        Args:
            job_id: The job.
            owner: From `process_identity`.
            ttl_s: Seconds until the lease ends unless renewed.

        Raises:
            InputError: No such job, or another process drives it.
        """
        with self._database.write() as connection:
            leased = (JobRow.coordinator_until > now()).label("leased")
            query = select(JobRow.coordinator, JobRow.coordinator_fence, leased).where(JobRow.id == job_id).with_for_update()
            job = connection.execute(query).one_or_none()
            if job is None:
                raise _unknown(job_id)
            if job.leased and not holder_is_dead(job.coordinator):
                raise InputError(f"job {job_id!r} is driven by the process {job.coordinator}; stop that one or wait for its end")
            fence: int = job.coordinator_fence + 1
            lease = {"coordinator": owner, "coordinator_until": now() + ttl_s, "coordinator_fence": fence}
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(lease))
            leases.note(connection, job_id, [("job.coordinator", {"owner": owner, "fence": fence})])
        return fence

    def renew_coordinator(self, job_id: str, fence: int, ttl_s: float) -> None:
        """Moves the end of the lease to `ttl_s` seconds from now.

        Raises:
            LeaseLost: Another process took over.
        """
        with self._database.write() as connection:
            _fenced(connection, job_id, fence)
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(coordinator_until=now() + ttl_s))

    def release_coordinator(self, job_id: str, fence: int) -> None:
        """Ends the lease; nothing happens where it was lost before."""
        free = {"coordinator": None, "coordinator_until": None, "coordinator_fence": fence + 1}
        with self._database.write() as connection:
            connection.execute(update(JobRow).where(JobRow.id == job_id, JobRow.coordinator_fence == fence).values(free))

    # Trials, by the coordinator

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
        """
        with self._database.write() as connection:
            job = _fenced(connection, job_id, fence)
            if proposal.number != job.trials:
                raise ValueError(f"trial numbers are dense: {proposal.number} cannot follow {job.trials} trials")
            evaluation_id, state, repeated = _evaluation(connection, job_id, proposal)
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

    def claim(self, evaluation_id: int, worker: str, ttl_s: float) -> Claim | None:
        """The right to do this work; None when it is not queued (any more).

        Args:
            evaluation_id: The work.
            worker: From `process_identity`.
            ttl_s: Seconds until the lease ends unless renewed.
        """
        with self._database.write() as connection:
            return leases.take(connection, evaluation_id, worker, ttl_s)

    def renew(self, claim: Claim, ttl_s: float) -> bool:
        """Moves the end of the lease to `ttl_s` seconds from now; False when the claim is void and the work should stop."""
        with self._database.write() as connection:
            return leases.move(connection, claim.evaluation_id, claim.fence, {"lease_until": now() + ttl_s})

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
        attempt = {"failure": str(failure), "message": message, "log": _end(log), "seconds": seconds, "facts": dict(facts or {})}
        with self._database.write() as connection:
            if not leases.decide(connection, claim.evaluation_id, claim.fence, State.FAILED, "failed", **attempt):
                leases.keep_late(connection, claim, attempt)
                return False
            leases.announce(connection, claim.evaluation_id, State.FAILED, {"failure": str(failure)})
            return True

    def lost(self, claim: Claim, reason: str, log: str = "") -> State:
        """Gives the work back after the runner died of something that is not the candidate's; returns its state from then on.

        It is queued again, or quarantined after the third loss. A void claim changes nothing.
        """
        with self._database.write() as connection:
            leases.lose(connection, claim.evaluation_id, claim.fence, reason, _end(log))
            return connection.execute(select(EvaluationRow.state).where(EvaluationRow.id == claim.evaluation_id)).scalar_one()

    def release(self, claim: Claim) -> bool:
        """Gives the work back unfinished, on an orderly shutdown: no loss is counted. False when the claim was void."""
        with self._database.write() as connection:
            if not leases.give_back(connection, claim.evaluation_id, claim.fence, "released"):
                return False
            leases.announce(connection, claim.evaluation_id, State.QUEUED, {"reason": "the worker was asked to stop"})
            return True

    def reap(self) -> int:
        """Ends the claims of workers whose lease ran out or who are surely dead, as `lost` does; returns how many."""
        with self._database.read() as connection:
            if not leases.expired(connection):  # the usual case, and readers wait for nobody
                return 0
        with self._database.write() as connection:
            expired = leases.expired(connection)
            for evaluation_id, fence, worker in expired:
                leases.lose(connection, evaluation_id, fence, f"no sign of life from worker {worker}", "")
            return len(expired)

    # Reading

    def trial(self, job_id: str, number: int) -> Trial:
        """One trial.

        Raises:
            InputError: There is no such job or trial.
        """
        found = self._trials(TRIAL.where(TrialRow.job_id == job_id, TrialRow.number == number))
        if not found:
            raise InputError(f"job {job_id!r} has no trial {number}; it has {self.counts(job_id).trials}, counted from 0")
        return found[0]

    def trials(self, job_id: str, after: int = -1, limit: int = 500) -> list[Trial]:
        """The next `limit` trials by number, following the trial `after`, the last of the page before."""
        return self._trials(TRIAL.where(TrialRow.job_id == job_id, TrialRow.number > after).order_by(TrialRow.number).limit(limit))

    def attempts(self, evaluation_id: int) -> list[Attempt]:
        """Every try at an evaluation with its log, the first one first."""
        with self._database.read() as connection:
            rows = connection.execute(ATTEMPT.where(EvaluationRow.id == evaluation_id).order_by(AttemptRow.fence))
            return [attempt_of(row) for row in rows]

    def events(self, job_id: str, after: int = 0, limit: int = 500) -> list[Event]:
        """The next `limit` events of the job with a `seq` above `after`; the first event has 1."""
        query = select(EventRow.seq, EventRow.kind, EventRow.body, EventRow.created_at)
        query = query.where(EventRow.job_id == job_id, EventRow.seq > after).order_by(EventRow.seq).limit(limit)
        with self._database.read() as connection:
            return [Event(*row) for row in connection.execute(query)]

    def _trials(self, query: Select[Any]) -> list[Trial]:
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            ids = {row.evaluation_id for row in rows}
            of_these = MEASUREMENT.where(MeasurementRow.evaluation_id.in_(ids)).order_by(MeasurementRow.evaluation_id, MeasurementRow.name)
            found = connection.execute(of_these).all()
        measured = {key: [measurement_of(item) for item in group] for key, group in groupby(found, lambda item: item.evaluation_id)}
        return [trial_of(row, measured.get(row.evaluation_id, [])) for row in rows]


def _unknown(job_id: str) -> InputError:
    return InputError(f"this database has no job {job_id!r}; `autoeff ls` shows those it has")


def _end(log: str) -> str:
    return log[-LOG_CHARACTERS:]


def _fenced(connection: Connection, job_id: str, fence: int) -> Row[JobState, int, str | None, int]:
    """The job, locked for this transaction, once `fence` is seen to be its newest."""
    query = select(JobRow.state, JobRow.trials, JobRow.coordinator, JobRow.coordinator_fence)
    row = connection.execute(query.where(JobRow.id == job_id).with_for_update()).one_or_none()
    if row is None:
        raise _unknown(job_id)
    if row.coordinator_fence != fence:
        raise LeaseLost(f"job {job_id!r} is no longer driven by this process but by {row.coordinator or 'none'}; nothing was written")
    return row


def _evaluation(connection: Connection, job_id: str, proposal: Proposal) -> tuple[int, State, bool]:
    """The work for a proposal, made where there is none: its id, its state, and whether this job had asked for it before."""
    own = select(TrialRow.number).where(TrialRow.evaluation_id == EvaluationRow.id, TrialRow.job_id == job_id).exists()
    reusable = or_(own, EvaluationRow.state.in_((*leases.OPEN, State.SUCCEEDED)))
    query = select(EvaluationRow.id, EvaluationRow.state, own.label("own")).where(EvaluationRow.eval_key == proposal.eval_key, reusable)
    row = connection.execute(query.order_by(own.desc(), EvaluationRow.id.desc()).limit(1)).one_or_none()
    if row is not None:
        return row.id, row.state, row.own
    digest = proposal.configuration.digest
    if connection.execute(select(ConfigurationRow.digest).where(ConfigurationRow.digest == digest)).first() is None:
        connection.execute(insert(ConfigurationRow).values(digest=digest, canonical=proposal.configuration.canonical))
    inserted = connection.execute(
        insert(EvaluationRow).values(
            configuration=digest,
            eval_key=proposal.eval_key,
            split=proposal.split,
            windows=proposal.windows,
            state=State.QUEUED,
            attempts=0,
            losses=0,
            fence=0,
            created_at=now(),
        )
    )
    assert inserted.inserted_primary_key is not None
    return inserted.inserted_primary_key[0], State.QUEUED, False


def _mark_told(connection: Connection, job_id: str, numbers: Iterable[int]) -> None:
    if numbers := list(numbers):
        mine = and_(TrialRow.job_id == job_id, TrialRow.number.in_(numbers), TrialRow.told_at.is_(None))
        connection.execute(update(TrialRow).where(mine).values(told_at=now()))
