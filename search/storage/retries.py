"""Failed trials that are tried again: they ask for new work, and what failed stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, select, update

from autoeff.errors import Conflict, FailureClass
from autoeff.search.storage import leases
from autoeff.search.storage.database import again
from autoeff.search.storage.jobs import Jobs, move_job, versioned
from autoeff.search.storage.records import Job, JobState, State
from autoeff.search.storage.tables import AttemptRow, EvaluationRow, JobRow, TrialRow
from autoeff.search.storage.trials import queued

__all__ = ["Retries"]

_RETRIED_AT_ONCE = 200


class Retries(Jobs):
    """Second tries at the trials of a job."""

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
            job = versioned(connection, job_id, None)
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
            move_job(connection, job_id, job.state, going_on, {"error": None, **driven})


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
        if (new := queued(connection, work, queue)) is not None:
            return new, State.QUEUED
