"""The life of an evaluation: queued, running under a lease, decided once.

    queued -> running -> succeeded | failed | quarantined | cancelled      back only as running -> queued, and under a new fence

Whoever changes both locks the evaluation before the jobs that ask for it, and jobs in the order of their ids, so that no two
transactions wait for each other.

A queued evaluation of a queue waits in the outbox, and is claimed by taking it from there; one that is not there was set aside with the
jobs that wanted it, and waits for one of them to go on.

Each function is part of a transaction of the store. All changes of a running evaluation are a compare-and-set on its fence; so of any
two processes that believe to hold it, the database lets one write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Double, and_, bindparam, delete, exists, insert, or_, select, update

from autoeff.errors import FailureClass
from autoeff.search.storage.database import InTheWay, insert_absent
from autoeff.search.storage.holders import holder_is_dead
from autoeff.search.storage.records import Claim, JobState, Outcome, State
from autoeff.search.storage.rows import CLAIM, claim_of, written
from autoeff.search.storage.tables import AttemptRow, EvaluationRow, EventRow, JobRow, OutboxRow, TrialRow, now

__all__ = [
    "OPEN",
    "announce",
    "decide",
    "drop",
    "expired",
    "give_back",
    "keep_late",
    "lock",
    "lose",
    "note",
    "renew",
    "ring",
    "set_aside",
    "settle",
    "take",
    "wanted",
]

OPEN = (State.QUEUED, State.RUNNING)
_WANTING = tuple(state for state in JobState if state not in (JobState.CANCELLING, JobState.CANCELLED))
_WAITING = (JobState.PENDING, JobState.RUNNING, JobState.SUCCEEDED)  # of the last, proposals for another budget may be measured
LOSSES_TO_QUARANTINE = 3
"""A plant may fail twice under one candidate; the third time it is the candidate (design, law 7)."""

# What every claim and outcome executes: making a statement takes five times as long as executing it. Columns that a statement does not
# name are set from the values that it is executed with.
_THIS = EvaluationRow.id == bindparam("of")
_MINE = and_(_THIS, EvaluationRow.fence == bindparam("under"), EvaluationRow.state == State.RUNNING)
_THERE = or_(EvaluationRow.queue.is_(None), exists().where(OutboxRow.evaluation_id == EvaluationRow.id))
_STEP = {"state": State.RUNNING, "attempts": EvaluationRow.attempts + 1, "fence": EvaluationRow.fence + 1}
_UNTIL = {"lease_until": now() + bindparam("ttl_s", type_=Double)}
_TAKE = update(EvaluationRow).where(_THIS, EvaluationRow.state == State.QUEUED, _THERE).values(_STEP | _UNTIL).returning(*CLAIM)
_TAKE_OUT = delete(OutboxRow).where(OutboxRow.evaluation_id == bindparam("of"))
_BEGIN = insert(AttemptRow).values(started_at=now())
_RENEW = update(EvaluationRow).where(_MINE).values(_UNTIL)
_DECIDE = update(EvaluationRow).where(_MINE).values(lease_until=None, ended_at=now())
_BACK = {"losses": EvaluationRow.losses + bindparam("lost"), "worker": None, "lease_until": None}
_GIVE_BACK = update(EvaluationRow).where(_MINE).values(_BACK | {"state": State.QUEUED}).returning(EvaluationRow.queue)
_ATTEMPT = and_(AttemptRow.evaluation_id == bindparam("of"), AttemptRow.fence == bindparam("under"))
_END = update(AttemptRow).where(_ATTEMPT).values(ended_at=now())
_ASKING = select(TrialRow.job_id, TrialRow.number).where(TrialRow.evaluation_id == bindparam("of"))
_ASKING = _ASKING.order_by(TrialRow.job_id, TrialRow.number)
_COUNTERS = ("events", "trials", "succeeded", "failed", "quarantined", "cancelled", "cost")
_COUNT = update(JobRow).where(JobRow.id == bindparam("of")).values({n: getattr(JobRow, n) + bindparam(f"more_{n}") for n in _COUNTERS})
_COUNT = _COUNT.returning(JobRow.events, JobRow.state)
_NOTE = insert(EventRow).values(created_at=now()).returning(EventRow.seq)  # asked for an answer, several rows are one round trip


def take(connection: Connection, evaluation_id: int, worker: str, ttl_s: float) -> Claim | None:
    """Claims a queued evaluation; None when it is in another state, or set aside."""
    row = connection.execute(_TAKE, {"of": evaluation_id, "worker": worker, "ttl_s": ttl_s}).one_or_none()
    if row is None:
        return None
    claim = claim_of(row)
    if row.queue is not None and not connection.execute(_TAKE_OUT, {"of": evaluation_id}).rowcount:
        raise InTheWay(f"evaluation {evaluation_id} was set aside this moment")
    connection.execute(_BEGIN, {"evaluation_id": evaluation_id, "fence": claim.fence, "worker": worker})
    announce(connection, evaluation_id, State.RUNNING, {"worker": worker, "attempt": claim.attempt})
    return claim


def renew(connection: Connection, evaluation_id: int, fence: int, ttl_s: float) -> bool:
    """Moves the end of the lease; False when the fence is stale."""
    return connection.execute(_RENEW, {"of": evaluation_id, "under": fence, "ttl_s": ttl_s}).rowcount == 1


def lock(connection: Connection, evaluation_id: int) -> State:
    """The state of the evaluation, which no other transaction changes until this one ends."""
    return connection.execute(select(EvaluationRow.state).where(EvaluationRow.id == evaluation_id).with_for_update()).scalar_one()


def wanted(connection: Connection, evaluation_id: int) -> bool:
    """Whether any job still wants the result: one that is neither cancelled nor about to be."""
    query = select(TrialRow.number).join(JobRow, JobRow.id == TrialRow.job_id).where(TrialRow.evaluation_id == evaluation_id)
    return connection.execute(query.where(JobRow.state.in_(_WANTING)).limit(1)).first() is not None


def ring(connection: Connection, evaluation_id: int, queue: str | None) -> None:
    """Has messages sent for a queued evaluation until somebody claims it; for one without a queue nothing is to be done."""
    if queue is not None:
        insert_absent(connection, OutboxRow, {"evaluation_id": evaluation_id, "queue": queue, "sent": 0}, stamped="not_before")


def set_aside(connection: Connection, evaluation_id: int) -> None:
    """Takes an open evaluation from whoever has it, and keeps it from everybody, unless a job that goes on wants it."""
    query = select(EvaluationRow.state, EvaluationRow.fence).where(EvaluationRow.id == evaluation_id)
    state, fence = connection.execute(query.with_for_update()).one()
    if state not in OPEN:
        return
    # Locked whatever their state: one that is resumed this moment must find the evaluation, or have it rung for afterwards.
    jobs = select(JobRow.state).where(JobRow.id.in_(select(TrialRow.job_id).where(TrialRow.evaluation_id == evaluation_id)))
    if any(asking in _WAITING for asking in connection.execute(jobs.order_by(JobRow.id).with_for_update()).scalars()):
        return
    if state is State.RUNNING and give_back(connection, evaluation_id, fence, "released"):
        announce(connection, evaluation_id, State.QUEUED, {"reason": "its job was paused"})
    connection.execute(_TAKE_OUT, {"of": evaluation_id})


def decide(connection: Connection, evaluation_id: int, fence: int, state: State, outcome: Outcome, **attempt: Any) -> bool:
    """Ends the evaluation with this attempt's verdict; False when the fence is stale."""
    verdict = {"of": evaluation_id, "under": fence, "state": state, "accepted_fence": fence}
    return connection.execute(_DECIDE, verdict).rowcount == 1 and _end_attempt(connection, evaluation_id, fence, outcome, **attempt)


def give_back(connection: Connection, evaluation_id: int, fence: int, outcome: Outcome, *, losses: int = 0, **attempt: Any) -> bool:
    """Queues the evaluation again; False when the fence is stale."""
    row = connection.execute(_GIVE_BACK, {"of": evaluation_id, "under": fence, "fence": fence + 1, "lost": losses}).one_or_none()
    if row is None:
        return False
    ring(connection, evaluation_id, row.queue)
    return _end_attempt(connection, evaluation_id, fence, outcome, **attempt)


def drop(connection: Connection, evaluation_id: int) -> None:
    """Cancels a queued evaluation that nobody wants any more; nothing happens otherwise."""
    if lock(connection, evaluation_id) is not State.QUEUED or wanted(connection, evaluation_id):
        return
    verdict = {"state": State.CANCELLED, "accepted_fence": EvaluationRow.fence, "ended_at": now()}
    connection.execute(update(EvaluationRow).where(EvaluationRow.id == evaluation_id).values(verdict))
    connection.execute(_TAKE_OUT, {"of": evaluation_id})
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
    rows = connection.execute(query.where(EvaluationRow.state == written(State.RUNNING)).order_by(EvaluationRow.lease_until)).all()
    return [(row.id, row.fence, row.worker) for row in rows if row.ended or holder_is_dead(row.worker)]


def keep_late(connection: Connection, claim: Claim, report: dict[str, Any]) -> None:
    """Keeps what the holder of a stale claim reports; it never counts."""
    mine = and_(AttemptRow.evaluation_id == claim.evaluation_id, AttemptRow.fence == claim.fence)
    connection.execute(update(AttemptRow).where(mine).values(late=report))


def announce(connection: Connection, evaluation_id: int, state: State, body: Mapping[str, Any]) -> None:
    """Tells every job with a trial that asks for this evaluation."""
    rows = connection.execute(_ASKING, {"of": evaluation_id}).all()
    for job_id, trials in groupby(rows, lambda row: str(row.job_id)):
        events = [(f"trial.{state}", {"trial": row.number, **body}) for row in trials]
        if note(connection, job_id, events, {state: len(events)} if state.terminal else {}) is JobState.CANCELLING:
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
) -> JobState:
    """Appends events (kind, body) and adds to the job's counters; returns the job's state."""
    more = {"events": len(events), **(added or {})}
    # The update locks the row, so that other writers wait and `seq` has no gaps.
    counted = connection.execute(_COUNT, {"of": job_id} | {f"more_{name}": more.get(name, 0) for name in _COUNTERS})
    last, state = counted.one()
    rows = [{"seq": last - len(events) + i, "kind": kind, "body": dict(body)} for i, (kind, body) in enumerate(events, start=1)]
    connection.execute(_NOTE, [{"job_id": job_id, **row} for row in rows])
    return JobState(state)


def _end_attempt(connection: Connection, evaluation_id: int, fence: int, outcome: Outcome, **values: Any) -> bool:
    ended = {"of": evaluation_id, "under": fence, "outcome": outcome, **values}
    return connection.execute(_END, ended).rowcount == 1
