"""The tables: everything that the search must not forget.

An *evaluation* is the work, shared by equal configurations; a *trial* is one job's wish for it; an *attempt* is one try at it.
Statements are dialect-neutral; what differs between databases is `now`, how a transaction begins (`database`) and the triggers
(`migrations`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Double,
    Enum,
    Float,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from autoeff.search.storage.records import JobState, State

__all__ = [
    "REVISION",
    "ApiKeyRow",
    "AttemptRow",
    "Base",
    "ConfigurationRow",
    "EvaluationRow",
    "EventRow",
    "HardwareRow",
    "IdempotencyRow",
    "Instant",
    "JobRow",
    "MeasurementRow",
    "OutboxRow",
    "TrialRow",
    "WorkerRow",
    "now",
]

REVISION = "0003"
"""The newest migration. Known here so that opening a current database does not import Alembic (0.3 s)."""


class Instant(TypeDecorator[datetime]):
    """A point in time: seconds since 1970 in UTC in the database, so that leases are plain sums; an aware datetime outside."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> float | None:
        return None if value is None else value.timestamp()

    def process_result_value(self, value: float | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value, UTC)

    def coerce_compared_value(self, op: object, value: object) -> Any:
        return Float() if isinstance(value, (int, float)) else self


class now(FunctionElement[datetime]):
    """The database's clock, in UTC. No other clock is ever stored or compared."""

    type = Instant()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **_: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def _states(kind: type[State] | type[JobState]) -> Enum:
    # Text and a check instead of a native type: adding a state is then the same migration on every database.
    values = [str(member) for member in kind]
    return Enum(kind, values_callable=lambda _: values, native_enum=False, length=16, name="state", create_constraint=True)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: Instant(),
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(),
        float: Double(),
    }


_OPEN_JOBS = "queue IS NOT NULL AND state IN ('pending', 'running', 'cancelling')"


class JobRow(Base):
    __tablename__ = "job"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[JobState] = mapped_column(_states(JobState))
    version: Mapped[int]
    owner: Mapped[str | None] = mapped_column(String(64))
    queue: Mapped[str | None] = mapped_column(String(64))  # NULL: the process that began it evaluates it
    spec: Mapped[dict[str, Any]]
    budget: Mapped[dict[str, Any] | None]  # NULL: that of the spec
    preflight: Mapped[dict[str, Any]]
    space: Mapped[dict[str, Any]]
    setup_digest: Mapped[str] = mapped_column(String(64))
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    coordinator: Mapped[str | None] = mapped_column(Text)
    coordinator_until: Mapped[datetime | None]
    coordinator_fence: Mapped[int]
    # Counted in the transactions that change them: a list of jobs must not count a million trials.
    trials: Mapped[int]
    succeeded: Mapped[int]
    failed: Mapped[int]
    quarantined: Mapped[int]
    cancelled: Mapped[int]
    cost: Mapped[float]
    events: Mapped[int]

    __table_args__ = (
        Index(None, "created_at", "id"),
        Index(None, "owner", "created_at", "id"),
        Index("ix_job_open", "state", sqlite_where=text(_OPEN_JOBS), postgresql_where=text(_OPEN_JOBS)),
    )


class ConfigurationRow(Base):
    __tablename__ = "configuration"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    canonical: Mapped[str] = mapped_column(Text)


class EvaluationRow(Base):
    __tablename__ = "evaluation"

    id: Mapped[int] = mapped_column(primary_key=True)
    configuration: Mapped[str] = mapped_column(ForeignKey("configuration.digest"))
    eval_key: Mapped[str] = mapped_column(String(64))
    split: Mapped[str] = mapped_column(String(16))
    windows: Mapped[int]
    queue: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[State] = mapped_column(_states(State))
    attempts: Mapped[int]
    losses: Mapped[int]
    fence: Mapped[int]
    worker: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None]
    accepted_fence: Mapped[int | None]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        # Single flight: equal work is queued, running or done at most once.
        Index(
            "uq_evaluation_eval_key",
            "eval_key",
            unique=True,
            sqlite_where=text("state IN ('queued', 'running', 'succeeded')"),
            postgresql_where=text("state IN ('queued', 'running', 'succeeded')"),
        ),
        Index(None, "eval_key"),
        # Trials in a state that few are in.
        Index(
            "ix_evaluation_rare_state", "state", sqlite_where=text("state != 'succeeded'"), postgresql_where=text("state != 'succeeded'")
        ),
        Index(None, "lease_until", sqlite_where=text("state = 'running'"), postgresql_where=text("state = 'running'")),
        CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="leased"),
        CheckConstraint("(state IN ('queued', 'running')) = (accepted_fence IS NULL)", name="decided"),
    )


class TrialRow(Base):
    __tablename__ = "trial"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    evaluation_id: Mapped[int] = mapped_column(ForeignKey("evaluation.id"))
    origin: Mapped[str] = mapped_column(String(16))
    label: Mapped[str | None] = mapped_column(Text)
    feasible: Mapped[bool]
    cost: Mapped[float]
    costs: Mapped[dict[str, Any]]
    sampler_state: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    told_at: Mapped[datetime | None]
    # Evaluations that it asked for before, which failed and were tried again; NULL where there are none.
    earlier: Mapped[list[int] | None] = mapped_column(JSON(none_as_null=True))

    __table_args__ = (
        Index(None, "evaluation_id", "job_id"),
        Index(None, "job_id", "origin", "number"),
        Index("ix_trial_untold", "job_id", "number", sqlite_where=text("told_at IS NULL"), postgresql_where=text("told_at IS NULL")),
    )


class AttemptRow(Base):
    __tablename__ = "attempt"

    evaluation_id: Mapped[int] = mapped_column(ForeignKey("evaluation.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str] = mapped_column(Text)
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(16))
    seconds: Mapped[float | None]
    failure: Mapped[str | None] = mapped_column(String(16))
    message: Mapped[str | None] = mapped_column(Text)
    log: Mapped[str | None] = mapped_column(Text)
    facts: Mapped[dict[str, Any] | None]
    late: Mapped[dict[str, Any] | None]


class MeasurementRow(Base):
    __tablename__ = "measurement"

    evaluation_id: Mapped[int] = mapped_column(ForeignKey("evaluation.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    split: Mapped[str] = mapped_column(String(16), primary_key=True)  # "" and 0 where the measurement has none: keys hold no NULL
    tokens: Mapped[int] = mapped_column(primary_key=True)
    statistic: Mapped[str] = mapped_column(String(16), primary_key=True)
    value: Mapped[float]
    unit: Mapped[str] = mapped_column(String(32))
    spread: Mapped[float | None]
    method: Mapped[str] = mapped_column(String(16))
    hardware: Mapped[str | None] = mapped_column(Text)


class EventRow(Base):
    __tablename__ = "event"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class OutboxRow(Base):
    """A queued evaluation whose message is to be sent, or sent again: gone when it is claimed."""

    __tablename__ = "outbox"

    evaluation_id: Mapped[int] = mapped_column(ForeignKey("evaluation.id"), primary_key=True)
    queue: Mapped[str] = mapped_column(String(64))
    not_before: Mapped[datetime]
    sent: Mapped[int]

    __table_args__ = (Index(None, "queue", "evaluation_id"), Index(None, "not_before"))


class HardwareRow(Base):
    __tablename__ = "hardware"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[str] = mapped_column(String(64))
    facts: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class WorkerRow(Base):
    __tablename__ = "worker"

    id: Mapped[str] = mapped_column(String(255), primary_key=True)  # the process identity under which it claims
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    queues: Mapped[list[str]]
    started_at: Mapped[datetime]
    seen_until: Mapped[datetime]

    __table_args__ = (Index(None, "seen_until"),)


class ApiKeyRow(Base):
    __tablename__ = "api_key"

    prefix: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]]
    owner: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class IdempotencyRow(Base):
    __tablename__ = "idempotency"

    key_prefix: Mapped[str] = mapped_column(ForeignKey("api_key.prefix"), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    body: Mapped[dict[str, Any]]
    expires_at: Mapped[datetime]

    __table_args__ = (Index(None, "expires_at"),)
