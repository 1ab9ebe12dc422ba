"""How rows are read, and become the values that leave the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, literal, select

from autoeff.errors import FailureClass
from autoeff.search.storage.holders import holder_is_dead
from autoeff.search.storage.records import Attempt, Claim, Counts, Failure, Job, State, Trial
from autoeff.search.storage.tables import AttemptRow, ConfigurationRow, EvaluationRow, JobRow, MeasurementRow, TrialRow, now
from autoeff.spaces.configuration import Configuration
from autoeff.spaces.measurements import MEASURES, Measurement

__all__ = [
    "ATTEMPT",
    "CLAIM",
    "COUNTS",
    "JOB",
    "MEASUREMENT",
    "TRIAL",
    "attempt_of",
    "claim_of",
    "job_of",
    "measurement_of",
    "one_of",
    "trial_of",
    "values_of",
    "written",
]

COUNTS = select(JobRow.trials, JobRow.succeeded, JobRow.failed, JobRow.quarantined, JobRow.cost, JobRow.cancelled)
JOB = select(JobRow.__table__, (JobRow.coordinator_until > now()).label("leased"))
TRIAL = (
    select(
        TrialRow.__table__,
        EvaluationRow.state,
        EvaluationRow.split,
        EvaluationRow.windows,
        EvaluationRow.attempts,
        EvaluationRow.ended_at,
        ConfigurationRow.canonical,
        AttemptRow.seconds,
        AttemptRow.failure,
        AttemptRow.message,
    )
    .join(EvaluationRow, EvaluationRow.id == TrialRow.evaluation_id)
    .join(ConfigurationRow, ConfigurationRow.digest == EvaluationRow.configuration)
    .outerjoin(AttemptRow, and_(AttemptRow.evaluation_id == EvaluationRow.id, AttemptRow.fence == EvaluationRow.accepted_fence))
)
CLAIM = (
    EvaluationRow.id,
    EvaluationRow.fence,
    EvaluationRow.attempts,
    EvaluationRow.worker,
    EvaluationRow.split,
    EvaluationRow.windows,
    EvaluationRow.queue,
    select(ConfigurationRow.canonical)
    .where(ConfigurationRow.digest == EvaluationRow.configuration)
    .correlate(EvaluationRow)
    .scalar_subquery()
    .label("canonical"),
)
"""What the update that claims an evaluation returns."""
ATTEMPT = select(AttemptRow.__table__, (EvaluationRow.accepted_fence == AttemptRow.fence).label("accepted")).join(
    EvaluationRow, EvaluationRow.id == AttemptRow.evaluation_id
)
MEASUREMENT = select(MeasurementRow.__table__)


def written(state: State) -> ColumnElement[State]:
    """A state as part of the statement: SQLite does not use a partial index for a parameter."""
    return literal(state, EvaluationRow.state.type, literal_execute=True)


def one_of(job_id: str) -> ColumnElement[bool]:
    """That a trial is one of this job, where its evaluation leads to it: SQLite would go through all trials of the job instead."""
    return TrialRow.job_id.concat("") == job_id


def job_of(row: Row[Any]) -> Job:
    """A row of `JOB`."""
    return Job(
        id=row.id,
        state=row.state,
        spec=row.spec,
        preflight=row.preflight,
        space=row.space,
        setup_digest=row.setup_digest,
        result=row.result,
        created_at=row.created_at,
        ended_at=row.ended_at,
        coordinator=row.coordinator if row.leased and not holder_is_dead(row.coordinator) else None,
        counts=Counts(row.trials, row.succeeded, row.failed, row.quarantined, row.cost, row.cancelled),
        version=row.version,
        owner=row.owner,
        queue=row.queue,
        budget=row.budget,
        error=row.error,
        events=row.events,
    )


def trial_of(row: Row[Any], measured: Sequence[Measurement]) -> Trial:
    """A row of `TRIAL` with the measurements of its evaluation."""
    costs = [_cost(name, stored) for name, stored in row.costs.items()]
    return Trial(
        number=row.number,
        evaluation_id=row.evaluation_id,
        configuration=Configuration(json.loads(row.canonical)),
        origin=row.origin,
        label=row.label,
        state=row.state,
        split=row.split,
        windows=row.windows,
        cost=row.cost,
        feasible=row.feasible,
        measurements=(*costs, *measured),
        failure=_failure(row),
        seconds=row.seconds,
        attempts=row.attempts,
        earlier=tuple(row.earlier or ()),
        sampler_state=row.sampler_state,
        told=row.told_at is not None,
        created_at=row.created_at,
        ended_at=row.ended_at,
    )


def _cost(name: str, stored: float | Mapping[str, Any]) -> Measurement:
    """A number is exact; what came about otherwise says how."""
    if isinstance(stored, Mapping):
        return Measurement(name, stored["value"], method=stored["method"])
    return Measurement(name, stored, method="exact")


def claim_of(row: Row[Any]) -> Claim:
    """A row of `CLAIM` that was just taken."""
    return Claim(
        evaluation_id=row.id,
        fence=row.fence,
        attempt=row.attempts,
        worker=row.worker,
        configuration=Configuration(json.loads(row.canonical)),
        split=row.split,
        windows=row.windows,
    )


def attempt_of(row: Row[Any]) -> Attempt:
    """A row of `ATTEMPT`."""
    return Attempt(
        fence=row.fence,
        worker=row.worker,
        started_at=row.started_at,
        ended_at=row.ended_at,
        accepted=bool(row.accepted),
        outcome=row.outcome,
        seconds=row.seconds,
        failure=_failure(row),
        log=None if row.log is None else _visible(row.log),
        facts=row.facts or {},
        late=row.late,
    )


def measurement_of(row: Row[Any]) -> Measurement:
    """A row of `MEASUREMENT`."""
    return Measurement(
        name=row.name,
        value=row.value,
        split=row.split or None,
        tokens=row.tokens or None,
        spread=row.spread,
        statistic=row.statistic,
        method=row.method,
        hardware=row.hardware,
        own=not row.unit and row.name not in MEASURES,
    )


def values_of(evaluation_id: int, item: Measurement) -> dict[str, Any]:
    """What `measurement_of` reads, for an insert."""
    return {
        "evaluation_id": evaluation_id,
        "name": item.name,
        "split": item.split or "",
        "tokens": item.tokens or 0,
        "statistic": item.statistic,
        "value": item.value,
        "unit": item.unit,
        "spread": item.spread,
        "method": item.method,
        "hardware": item.hardware,
    }


def _failure(row: Row[Any]) -> Failure | None:
    return None if row.failure is None else Failure(FailureClass(row.failure), _visible(row.message))


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
_CONTROLS |= dict.fromkeys([0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def _visible(text: str) -> str:
    """What a candidate printed, so that it moves no cursor, colours nothing and turns no line around where it is shown."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)
