"""The life of an evaluation: queued, running under a lease, decided once.

    queued -> running -> succeeded | failed | quarantined | cancelled      back only as running -> queued, and under a new fence

Whoever changes both locks the evaluation before the jobs that ask for it, and jobs in the order of their ids, so that no two
transactions wait for each other.

Each function is part of a transaction of the store. All changes of a running evaluation go through `move`, a compare-and-set on
its fence; so of any two processes that believe to hold it, the database lets one write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, literal, select, update

from autoeff.errors import FailureClass
from autoeff.search.storage.holders import holder_is_dead
from autoeff.search.storage.records import Claim, JobState, Outcome, State
from autoeff.search.storage.rows import CLAIM, claim_of
from autoeff.search.storage.tables import AttemptRow, EvaluationRow, EventRow, JobRow, OutboxRow, TrialRow, now

__all__ = [
    "OPEN",
    "RUNNING",
    "announce",
    "decide",
    "drop",
    "expired",
    "give_back",
    "keep_late",
    "lock",
    "lose",
    "move",
    "note",
    "ring",
    "settle",
    "take",
    "wanted",
]

OPEN = (State.QUEUED, State.RUNNING)
RUNNING = literal(State.RUNNING, EvaluationRow.state.type, literal_execute=True)
"""Written out in the statement: SQLite does not use a partial index for a parameter."""
LOSSES_TO_QUARANTINE = 3
"""A plant may fail twice under one candidate; the third time it is the candidate (design, law 7)."""


def take(connection: Connection, evaluation_id: int, worker: str, ttl_s: float) -> Claim | None:
    """Claims a queued evaluation; None when it is in another state."""
    lease = {"worker": worker, "lease_until": now() + ttl_s}
    step = {"state": State.RUNNING, "attempts": EvaluationRow.attempts + 1, "fence": EvaluationRow.fence + 1}
    queued = and_(EvaluationRow.id == evaluation_id, EvaluationRow.state == State.QUEUED)
    if connection.execute(update(EvaluationRow).where(queued).values(step | lease)).rowcount == 0:
        return None
    row = connection.execute(CLAIM.where(EvaluationRow.id == evaluation_id)).one()
    claim = claim_of(row)
    if row.queue is not None:
        connection.execute(delete(OutboxRow).where(OutboxRow.evaluation_id == evaluation_id))
    connection.execute(insert(AttemptRow).values(evaluation_id=evaluation_id, fence=claim.fence, worker=worker, started_at=now()))
    announce(connection, evaluation_id, State.RUNNING, {"worker": worker, "attempt": claim.attempt})
    return claim


def move(connection: Connection, evaluation_id: int, fence: int, values: Mapping[str, Any]) -> bool:
    """Changes a running evaluation if `fence` is its newest."""
    mine = and_(EvaluationRow.id == evaluation_id, EvaluationRow.fence == fence, EvaluationRow.state == State.RUNNING)
    return connection.execute(update(EvaluationRow).where(mine).values(values)).rowcount == 1


def lock(connection: Connection, evaluation_id: int) -> State:
    """The state of the evaluation, which no other transaction changes until this one ends."""
    return connection.execute(select(EvaluationRow.state).where(EvaluationRow.id == evaluation_id).with_for_update()).scalar_one()


def wanted(connection: Connection, evaluation_id: int) -> bool:
    """Whether any job still wants the result: one that is neither cancelled nor about to be."""
    query = select(TrialRow.number).join(JobRow, JobRow.id == TrialRow.job_id).where(TrialRow.evaluation_id == evaluation_id)
    return connection.execute(query.where(JobRow.state.not_in((JobState.CANCELLING, JobState.CANCELLED))).limit(1)).first() is not None


def ring(connection: Connection, evaluation_id: int, queue: str) -> None:
    """Has a message sent for a queued evaluation, until somebody claims it."""
    connection.execute(insert(OutboxRow).values(evaluation_id=evaluation_id, queue=queue, not_before=now(), sent=0))


def decide(connection: Connection, evaluation_id: int, fence: int, state: State, outcome: Outcome, **attempt: Any) -> bool:
    """Ends the evaluation with this attempt's verdict; False when the fence is stale."""
    verdict = {"state": state, "accepted_fence": fence, "lease_until": None, "ended_at": now()}
    return move(connection, evaluation_id, fence, verdict) and _end_attempt(connection, evaluation_id, fence, outcome, **attempt)


def give_back(connection: Connection, evaluation_id: int, fence: int, outcome: Outcome, *, losses: int = 0, **attempt: Any) -> bool:
    """Queues the evaluation again; False when the fence is stale."""
    back = {"state": State.QUEUED, "fence": fence + 1, "losses": EvaluationRow.losses + losses, "worker": None, "lease_until": None}
    if not move(connection, evaluation_id, fence, back):
        return False
    queue = connection.execute(select(EvaluationRow.queue).where(EvaluationRow.id == evaluation_id)).scalar_one()
    if queue is not None:
        ring(connection, evaluation_id, queue)
    return _end_attempt(connection, evaluation_id, fence, outcome, **attempt)


def drop(connection: Connection, evaluation_id: int) -> None:
    """Cancels a queued evaluation that nobody wants any more; nothing happens otherwise."""
    if lock(connection, evaluation_id) is not State.QUEUED or wanted(connection, evaluation_id):
        return
    verdict = {"state": State.CANCELLED, "accepted_fence": EvaluationRow.fence, "ended_at": now()}
    connection.execute(update(EvaluationRow).where(EvaluationRow.id == evaluation_id).values(verdict))
    connection.execute(delete(OutboxRow).where(OutboxRow.evaluation_id == evaluation_id))
    announce(connection, evaluation_id, State.CANCELLED, {})


def lose(connection: Connection, evaluation_id: int, fence: int, reason: str, log: str) -> bool:
    """Counts a lost worker: queued again, quarantined the third time, cancelled if nobody wants it; False when the fence is stale."""
    lock(connection, evaluation_id)
    losses = connection.execute(select(EvaluationRow.losses).where(EvaluationRow.id == evaluation_id)).scalar_one() + 1
    attempt = {"failure": str(FailureClass.LOST), "message": reason, "log": log}
    if not wanted(connection, evaluation_id):
        state = State.CANCELLED
        moved = decide(connection, evaluation_id, fence, state, "cancelled", **attempt)
    elif losses < LOSSES_TO_QUARANTINE:
        state = State.QUEUED
        moved = give_back(connection, evaluation_id, fence, "lost", losses=1, **attempt)
    else:
        state = State.QUARANTINED
        attempt["message"] = f"{reason}; lost {losses} workers, so it is not tried again"
        moved = decide(connection, evaluation_id, fence, state, "lost", **attempt)
    if moved:
        announce(connection, evaluation_id, state, {"reason": reason})
    return moved


def expired(connection: Connection) -> list[tuple[int, int, str]]:
    """Running evaluations without a living holder: id, fence, holder."""
    query = select(EvaluationRow.id, EvaluationRow.fence, EvaluationRow.worker, (EvaluationRow.lease_until <= now()).label("ended"))
    rows = connection.execute(query.where(EvaluationRow.state == RUNNING).order_by(EvaluationRow.lease_until)).all()
    return [(row.id, row.fence, row.worker) for row in rows if row.ended or holder_is_dead(row.worker)]


def keep_late(connection: Connection, claim: Claim, report: dict[str, Any]) -> None:
    """Keeps what the holder of a stale claim reports; it never counts."""
    mine = and_(AttemptRow.evaluation_id == claim.evaluation_id, AttemptRow.fence == claim.fence)
    connection.execute(update(AttemptRow).where(mine).values(late=report))


def announce(connection: Connection, evaluation_id: int, state: State, body: Mapping[str, Any]) -> None:
    """Tells every job with a trial that asks for this evaluation."""
    query = select(TrialRow.job_id, TrialRow.number).where(TrialRow.evaluation_id == evaluation_id)
    rows = connection.execute(query.order_by(TrialRow.job_id, TrialRow.number)).all()
    for job_id, trials in groupby(rows, lambda row: str(row.job_id)):
        events = [(f"trial.{state}", {"trial": row.number, **body}) for row in trials]
        note(connection, job_id, events, {state: len(events)} if state.terminal else {})
        if state.terminal:
            settle(connection, job_id)


def settle(connection: Connection, job_id: str) -> None:
    """Ends a job that is being cancelled once none of its trials is open."""
    open_trials = JobRow.trials - JobRow.succeeded - JobRow.failed - JobRow.quarantined - JobRow.cancelled
    over = and_(JobRow.id == job_id, JobRow.state == JobState.CANCELLING, open_trials == 0)
    end = {"state": JobState.CANCELLED, "version": JobRow.version + 1, "ended_at": now()}
    if connection.execute(update(JobRow).where(over).values(end)).rowcount:
        note(connection, job_id, [("job.cancelled", {})])


def note(
    connection: Connection, job_id: str, events: Sequence[tuple[str, Mapping[str, Any]]], added: Mapping[str, float] | None = None
) -> None:
    """Appends events (kind, body) and adds to the job's counters."""
    sums = {name: getattr(JobRow, name) + value for name, value in (added or {}).items()}
    # The update locks the row, so that other writers wait and `seq` has no gaps.
    connection.execute(update(JobRow).where(JobRow.id == job_id).values(events=JobRow.events + len(events), **sums))
    last = connection.execute(select(JobRow.events).where(JobRow.id == job_id)).scalar_one()
    rows = [{"seq": last - len(events) + i, "kind": kind, "body": dict(body)} for i, (kind, body) in enumerate(events, start=1)]
    connection.execute(insert(EventRow).values(job_id=job_id, created_at=now()), rows)


def _end_attempt(connection: Connection, evaluation_id: int, fence: int, outcome: Outcome, **values: Any) -> bool:
    mine = and_(AttemptRow.evaluation_id == evaluation_id, AttemptRow.fence == fence)
    return connection.execute(update(AttemptRow).where(mine).values(outcome=outcome, ended_at=now(), **values)).rowcount == 1
