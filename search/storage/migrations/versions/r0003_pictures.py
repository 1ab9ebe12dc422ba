"""Trials that are found by their origin and their state, and tried again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("trial", sa.Column("earlier", sa.JSON()))
    op.create_index("ix_trial_job_id_origin_number", "trial", ["job_id", "origin", "number"])
    rare = sa.text("state != 'succeeded'")
    op.create_index("ix_evaluation_rare_state", "evaluation", ["state"], sqlite_where=rare, postgresql_where=rare)
