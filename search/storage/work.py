"""Evaluations: claimed by workers, decided once, given back or lost; and the messages that tell of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import case, exists, insert, select, update

from autoeff.errors import FailureClass
from autoeff.search.storage import leases
from autoeff.search.storage.database import again, storable
from autoeff.search.storage.jobs import Jobs
from autoeff.search.storage.records import Claim, Job, JobState, Message, State
from autoeff.search.storage.rows import JOB, job_of, values_of
from autoeff.search.storage.tables import EvaluationRow, JobRow, MeasurementRow, OutboxRow, TrialRow, now
from autoeff.spaces.measurements import Measurement

__all__ = ["LOG_CHARACTERS", "Work"]

LOG_CHARACTERS = 1 << 20
"""Of an attempt's log the end is kept, where the reason stands; workers send less (`Settings.log_bytes`)."""
_OFTEN, _SELDOM_S = 6, 60.0  # messages of an evaluation; between further ones
_MEASURED = insert(MeasurementRow).returning(MeasurementRow.name)  # asked for an answer, several rows are one round trip


class Work(Jobs):
    """The work behind trials."""

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
            moved = leases.renew(connection, claim.evaluation_id, claim.fence, ttl_s)
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
                connection.execute(_MEASURED, [values_of(claim.evaluation_id, item) for item in measurements])
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
    def release(self, claim: Claim, reason: str = "the worker was asked to stop") -> bool:
        """Gives the work back unfinished: no loss is counted. False when the claim was void.

        What no job wants any more is cancelled instead.

        Args:
            claim: The right to do so.
            reason: One line for people.
        """
        reason = storable(reason)
        with self._database.write() as connection:
            leases.lock(connection, claim.evaluation_id)
            if not leases.wanted(connection, claim.evaluation_id):
                state, body = State.CANCELLED, {}
                moved = leases.decide(connection, claim.evaluation_id, claim.fence, state, "cancelled")
            else:
                state, body = State.QUEUED, {"reason": reason}
                moved = leases.give_back(connection, claim.evaluation_id, claim.fence, "released", message=reason)
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

    def waiting(self, queues: Iterable[str], limit: int = 1, job_id: str | None = None, but: Collection[str] = ()) -> list[int]:
        """Evaluations, of one job or of any `but` these, that are queued for a worker of these queues, the oldest first."""
        query = select(OutboxRow.evaluation_id).where(OutboxRow.queue.in_(tuple(queues)))
        asked = exists().where(TrialRow.evaluation_id == OutboxRow.evaluation_id)
        if job_id is not None:
            query = query.where(asked.where(TrialRow.job_id == job_id))
        if but:
            query = query.where(~asked.where(TrialRow.job_id.in_(tuple(but))))
        with self._database.read() as connection:
            return list(connection.execute(query.order_by(OutboxRow.evaluation_id).limit(limit)).scalars())

    def due(self, again_s: float, limit: int = 500) -> list[Message]:
        """Messages that are to be sent now; each is due again `again_s` seconds later, unless its evaluation is claimed.

        One that was sent often, as where no worker is free for long, is due less often: a broker keeps what nobody takes.
        """
        is_due = OutboxRow.not_before <= now()
        with self._database.read() as connection:
            if connection.execute(select(OutboxRow.evaluation_id).where(is_due).limit(1)).first() is None:
                return []
        with self._database.write() as connection:
            query = select(OutboxRow.evaluation_id, OutboxRow.queue, OutboxRow.sent).where(is_due)
            rows = connection.execute(query.order_by(OutboxRow.evaluation_id).limit(limit).with_for_update(skip_locked=True)).all()
            sent = OutboxRow.evaluation_id.in_([row.evaluation_id for row in rows])
            wait_s = case((OutboxRow.sent < _OFTEN, again_s), else_=max(again_s, _SELDOM_S))
            connection.execute(update(OutboxRow).where(sent).values(not_before=now() + wait_s, sent=OutboxRow.sent + 1))
        return [Message(*row) for row in rows]


def _end(log: str) -> str:
    return storable(log[-LOG_CHARACTERS:])
