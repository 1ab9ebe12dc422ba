"""First tables: job, configuration, evaluation, trial, attempt, measurement, event."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from autoeff.search.storage.migrations.triggers import freeze

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("preflight", sa.JSON(), nullable=False),
        sa.Column("space", sa.JSON(), nullable=False),
        sa.Column("setup_digest", sa.String(64), nullable=False),
        sa.Column("result", sa.JSON()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("coordinator", sa.Text()),
        sa.Column("coordinator_until", sa.Double()),
        sa.Column("coordinator_fence", sa.Integer(), nullable=False),
        sa.Column("trials", sa.Integer(), nullable=False),
        sa.Column("succeeded", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("quarantined", sa.Integer(), nullable=False),
        sa.Column("cost", sa.Double(), nullable=False),
        sa.Column("events", sa.Integer(), nullable=False),
        sa.CheckConstraint("state IN ('pending', 'running', 'paused', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_job_state")),
    )
    op.create_index("ix_job_created_at_id", "job", ["created_at", "id"])
    op.create_table(
        "configuration",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("canonical", sa.Text(), nullable=False),
    )
    op.create_table(
        "evaluation",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("configuration", sa.String(64), sa.ForeignKey("configuration.digest"), nullable=False),
        sa.Column("eval_key", sa.String(64), nullable=False),
        sa.Column("split", sa.String(16), nullable=False),
        sa.Column("windows", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("worker", sa.Text()),
        sa.Column("lease_until", sa.Double()),
        sa.Column("accepted_fence", sa.Integer()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'quarantined')", name=op.f("ck_evaluation_state")),
        sa.CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name=op.f("ck_evaluation_leased")),
        sa.CheckConstraint("(state IN ('queued', 'running')) = (accepted_fence IS NULL)", name=op.f("ck_evaluation_decided")),
    )
    op.create_index("ix_evaluation_eval_key", "evaluation", ["eval_key"])
    _create_partial_index("ix_evaluation_lease_until", "evaluation", ["lease_until"], "state = 'running'")
    _create_partial_index("uq_evaluation_eval_key", "evaluation", ["eval_key"], "state IN ('queued', 'running', 'succeeded')", unique=True)
    op.create_table(
        "trial",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("job.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("evaluation_id", sa.Integer(), sa.ForeignKey("evaluation.id"), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("label", sa.Text()),
        sa.Column("feasible", sa.Boolean(), nullable=False),
        sa.Column("cost", sa.Double(), nullable=False),
        sa.Column("costs", sa.JSON(), nullable=False),
        sa.Column("sampler_state", sa.JSON()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("told_at", sa.Double()),
    )
    op.create_index("ix_trial_evaluation_id_job_id", "trial", ["evaluation_id", "job_id"])
    _create_partial_index("ix_trial_untold", "trial", ["job_id", "number"], "told_at IS NULL")
    op.create_table(
        "attempt",
        sa.Column("evaluation_id", sa.Integer(), sa.ForeignKey("evaluation.id"), primary_key=True),
        sa.Column("fence", sa.Integer(), primary_key=True),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("outcome", sa.String(16)),
        sa.Column("seconds", sa.Double()),
        sa.Column("failure", sa.String(16)),
        sa.Column("message", sa.Text()),
        sa.Column("log", sa.Text()),
        sa.Column("facts", sa.JSON()),
        sa.Column("late", sa.JSON()),
    )
    op.create_table(
        "measurement",
        sa.Column("evaluation_id", sa.Integer(), sa.ForeignKey("evaluation.id"), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("split", sa.String(16), primary_key=True),
        sa.Column("tokens", sa.Integer(), primary_key=True),
        sa.Column("statistic", sa.String(16), primary_key=True),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("unit", sa.String(32), nullable=False),
        sa.Column("spread", sa.Double()),
        sa.Column("method", sa.String(16), nullable=False),
        sa.Column("hardware", sa.Text()),
    )
    op.create_table(
        "event",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("job.id"), primary_key=True),
        sa.Column("seq", sa.Integer(), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    freeze("attempt", "UPDATE OF outcome, ended_at, seconds, failure, message, log, facts", "OLD.outcome IS NOT NULL")
    freeze("evaluation", "UPDATE", "OLD.state IN ('succeeded', 'failed', 'quarantined')")
    for table in ("measurement", "event"):
        freeze(table, "UPDATE")
    for table in ("evaluation", "attempt", "measurement", "event"):
        freeze(table, "DELETE")


def _create_partial_index(name: str, table: str, columns: list[str], where: str, *, unique: bool = False) -> None:
    op.create_index(name, table, columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
