"""Alembic's environment; Alembic runs this file, nobody imports it."""

from __future__ import annotations

from typing import Any

from alembic import context

from autoeff.search.storage.database import VERSION_TABLE
from autoeff.search.storage.tables import Base


def _is_ours(item: Any, name: str | None, kind: str, reflected: bool, compare_to: object) -> bool:
    # Other programs may keep tables in the same database; a comparison must not propose to drop them.
    return kind != "table" or name in Base.metadata.tables


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    include_object=_is_ours,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
