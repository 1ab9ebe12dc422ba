"""The service: owners, queues, changed budgets, cancelling; outbox, hardware, workers, keys, replies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from autoeff.search.storage.migrations.triggers import freeze

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_OPEN_JOBS = "queue IS NOT NULL AND state IN ('pending', 'running', 'cancelling')"
_FLIGHT = "state IN ('queued', 'running', 'succeeded')"


def upgrade() -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    # SQLite makes both tables anew, without their checks, indices and triggers.
    for name in ("job_created_at_id", "evaluation_eval_key", "evaluation_lease_until"):
        op.drop_index(f"ix_{name}")
    op.drop_index("uq_evaluation_eval_key")
    for table in ("job", "evaluation") if not sqlite else ():
        op.drop_constraint(op.f(f"ck_{table}_state"), table)
    with op.batch_alter_table("job") as job:
        job.add_column(sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
        job.add_column(sa.Column("owner", sa.String(64)))
        job.add_column(sa.Column("queue", sa.String(64)))
        job.add_column(sa.Column("budget", sa.JSON()))
        job.add_column(sa.Column("error", sa.Text()))
        job.add_column(sa.Column("cancelled", sa.Integer(), nullable=False, server_default="0"))
        job.create_check_constraint(
            op.f("ck_job_state"), "state IN ('pending', 'running', 'paused', 'cancelling', 'succeeded', 'failed', 'cancelled')"
        )
    with op.batch_alter_table("evaluation") as evaluation:
        evaluation.add_column(sa.Column("queue", sa.String(64)))
        evaluation.create_check_constraint(
            op.f("ck_evaluation_state"), "state IN ('queued', 'running', 'succeeded', 'failed', 'quarantined', 'cancelled')"
        )
        if sqlite:
            evaluation.create_check_constraint(op.f("ck_evaluation_leased"), "(state = 'running') = (lease_until IS NOT NULL)")
            evaluation.create_check_constraint(op.f("ck_evaluation_decided"), "(state IN ('queued', 'running')) = (accepted_fence IS NULL)")
    op.create_index("ix_job_created_at_id", "job", ["created_at", "id"])
    op.create_index("ix_job_owner_created_at_id", "job", ["owner", "created_at", "id"])
    op.create_index("ix_job_open", "job", ["state"], sqlite_where=sa.text(_OPEN_JOBS), postgresql_where=sa.text(_OPEN_JOBS))
    op.create_index("ix_evaluation_eval_key", "evaluation", ["eval_key"])
    running = sa.text("state = 'running'")
    op.create_index("ix_evaluation_lease_until", "evaluation", ["lease_until"], sqlite_where=running, postgresql_where=running)
    flight = sa.text(_FLIGHT)
    op.create_index("uq_evaluation_eval_key", "evaluation", ["eval_key"], unique=True, sqlite_where=flight, postgresql_where=flight)
    op.create_table(
        "outbox",
        sa.Column("evaluation_id", sa.Integer(), sa.ForeignKey("evaluation.id"), primary_key=True),
        sa.Column("queue", sa.String(64), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("sent", sa.Integer(), nullable=False),
    )
    op.create_index("ix_outbox_queue_evaluation_id", "outbox", ["queue", "evaluation_id"])
    op.create_index("ix_outbox_not_before", "outbox", ["not_before"])
    op.create_table(
        "hardware",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False, unique=True),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_table(
        "worker",
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("hardware_id", sa.Integer(), sa.ForeignKey("hardware.id"), nullable=False),
        sa.Column("queues", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_until", sa.Double(), nullable=False),
    )
    op.create_index("ix_worker_seen_until", "worker", ["seen_until"])
    op.create_table(
        "api_key",
        sa.Column("prefix", sa.String(16), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("revoked_at", sa.Double()),
        sa.Column("last_used_at", sa.Double()),
    )
    op.create_table(
        "idempotency",
        sa.Column("key_prefix", sa.String(16), sa.ForeignKey("api_key.prefix"), primary_key=True),
        sa.Column("idempotency_key", sa.String(255), primary_key=True),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
    )
    op.create_index("ix_idempotency_expires_at", "idempotency", ["expires_at"])
    freeze("evaluation", "UPDATE", "OLD.state IN ('succeeded', 'failed', 'quarantined', 'cancelled')")
    freeze("job", "UPDATE OF state", "OLD.state IN ('succeeded', 'cancelled') AND NEW.state <> OLD.state")
    if sqlite:
        freeze("evaluation", "DELETE")
