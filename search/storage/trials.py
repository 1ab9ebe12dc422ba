"""Trials: proposed by coordinators, each with the work that it shares with equal ones; and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Select, and_, bindparam, insert, or_, select, update

from autoeff.errors import Conflict, NotFound
from autoeff.search.storage import leases
from autoeff.search.storage.database import again, insert_absent
from autoeff.search.storage.jobs import Jobs, fenced
from autoeff.search.storage.records import Attempt, JobState, Proposal, State, Trial, TrialRef
from autoeff.search.storage.rows import ATTEMPT, MEASUREMENT, TRIAL, attempt_of, measurement_of, one_of, trial_of, written
from autoeff.search.storage.tables import AttemptRow, ConfigurationRow, EvaluationRow, MeasurementRow, TrialRow, now

__all__ = ["Trials", "queued"]

_STANDING = (JobState.PAUSED, JobState.CANCELLING, JobState.CANCELLED)
"""States in which nothing more is proposed."""

# What every proposal executes; see `leases` for why they are kept.
_OWN = select(TrialRow.number).where(TrialRow.evaluation_id == EvaluationRow.id, TrialRow.job_id == bindparam("job")).exists()
_EQUAL = (
    select(EvaluationRow.id, EvaluationRow.state, EvaluationRow.queue, _OWN.label("own"))
    .where(EvaluationRow.eval_key == bindparam("key"), or_(_OWN, EvaluationRow.state.in_((*leases.OPEN, State.SUCCEEDED))))
    .order_by(_OWN.desc(), EvaluationRow.id.desc())
    .limit(1)
    .with_for_update()
)
_PROPOSE = insert(TrialRow).values(created_at=now())
_ONE = TRIAL.where(TrialRow.job_id == bindparam("job"), TrialRow.number == bindparam("at"))
_UNTOLD = (
    TRIAL.where(TrialRow.job_id == bindparam("job"), TrialRow.told_at.is_(None), EvaluationRow.state.not_in(leases.OPEN))
    .order_by(EvaluationRow.ended_at, TrialRow.number)
)  # fmt: skip
_MEASURED = MEASUREMENT.where(MeasurementRow.evaluation_id.in_(bindparam("these", expanding=True)))
_MEASURED = _MEASURED.order_by(MeasurementRow.evaluation_id, MeasurementRow.name)


class Trials(Jobs):
    """The trials of jobs."""

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
            job = fenced(connection, job_id, fence)
            if job.state in _STANDING:
                raise Conflict(f"job {job_id!r} is {job.state}; nothing is proposed for it")
            if proposal.number != job.trials:
                raise ValueError(f"trial numbers are dense: {proposal.number} cannot follow {job.trials} trials")
            evaluation_id, state, repeated = found or _proposed_work(connection, job_id, proposal, job.queue)
            cost = 0.0 if repeated else proposal.cost
            connection.execute(
                _PROPOSE,
                {
                    "job_id": job_id,
                    "number": proposal.number,
                    "evaluation_id": evaluation_id,
                    "origin": proposal.origin,
                    "label": proposal.label,
                    "feasible": proposal.feasible,
                    "cost": cost,
                    "costs": dict(proposal.costs),
                    "sampler_state": None if proposal.sampler_state is None else dict(proposal.sampler_state),
                },
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
        return self._trials(_UNTOLD, {"job": job_id})

    def mark_told(self, job_id: str, fence: int, numbers: Iterable[int]) -> None:
        """Notes that the sampler has heard of these trials.

        Raises:
            LeaseLost: Another process took over.
        """
        with self._database.write() as connection:
            fenced(connection, job_id, fence)
            _mark_told(connection, job_id, numbers)

    def trial(self, job_id: str, number: int) -> Trial:
        """One trial.

        Raises:
            NotFound: There is no such job or trial.
        """
        found = self._trials(_ONE, {"job": job_id, "at": number})
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
            rare = select(EvaluationRow.id).where(EvaluationRow.state != written(State.SUCCEEDED))
            rare = rare.where(EvaluationRow.state.in_([written(state) for state in wanted]))
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

    def _trials(self, query: Select[Any], values: Mapping[str, Any] | None = None) -> list[Trial]:
        with self._database.read() as connection:
            rows = connection.execute(query, values).all()
            ids = {row.evaluation_id for row in rows}
            found = connection.execute(_MEASURED, {"these": list(ids)}).all() if ids else ()
        measured = {key: [measurement_of(item) for item in group] for key, group in groupby(found, lambda item: item.evaluation_id)}
        return [trial_of(row, measured.get(row.evaluation_id, [])) for row in rows]


def _equal_work(connection: Connection, job_id: str, eval_key: str) -> tuple[int, State, bool] | None:
    """The work of this key that a trial of the job can share: its id, its state, and whether this job had asked for it before."""
    # Locked, or it could end between this look and the insertion of the trial, which would then never hear of it.
    row = connection.execute(_EQUAL, {"job": job_id, "key": eval_key}).one_or_none()
    if row is None:
        return None
    if row.state is State.QUEUED:  # it may have been set aside
        leases.ring(connection, row.id, row.queue)
    return row.id, row.state, row.own


def _proposed_work(connection: Connection, job_id: str, proposal: Proposal, queue: str | None) -> tuple[int, State, bool]:
    """As `_equal_work`, for a proposal that had none."""
    digest = proposal.configuration.digest
    insert_absent(connection, ConfigurationRow, {"digest": digest, "canonical": proposal.configuration.canonical})
    work = {"configuration": digest, "eval_key": proposal.eval_key, "split": proposal.split, "windows": proposal.windows}
    if (new := queued(connection, work, queue)) is not None:
        return new, State.QUEUED, False
    found = _equal_work(connection, job_id, proposal.eval_key)
    assert found is not None
    return found


def queued(connection: Connection, work: Mapping[str, Any], queue: str | None) -> int | None:
    """The id of new work; None where another job's coordinator was faster."""
    begun = {"state": State.QUEUED, "queue": queue, "attempts": 0, "losses": 0, "fence": 0}
    inserted = insert_absent(connection, EvaluationRow, {**work, **begun}, stamped="created_at")
    if inserted is None:
        return None
    leases.ring(connection, inserted[0], queue)
    return int(inserted[0])


def _mark_told(connection: Connection, job_id: str, numbers: Iterable[int]) -> None:
    if numbers := list(numbers):
        mine = and_(TrialRow.job_id == job_id, TrialRow.number.in_(numbers), TrialRow.told_at.is_(None))
        connection.execute(update(TrialRow).where(mine).values(told_at=now()))
