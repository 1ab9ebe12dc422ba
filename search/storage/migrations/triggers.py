"""Triggers that refuse to change what is decided, in the dialect of either database."""

from __future__ import annotations

from alembic import op

__all__ = ["freeze"]


def freeze(table: str, operation: str, when: str = "1 = 1") -> None:
    """Makes rows of `table` final; an earlier trigger of the same table and operation is replaced.

    Args:
        table: Name of the table.
        operation: `DELETE`, `UPDATE`, or `UPDATE OF` columns.
        when: Condition on the OLD and the NEW row.
    """
    name = f"{table}_{operation.split()[0].lower()}_is_final"
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"DROP TRIGGER IF EXISTS {name}")
        op.execute(f"CREATE TRIGGER {name} BEFORE {operation} ON {table} WHEN {when} BEGIN SELECT RAISE(ABORT, '{table} is final'); END")
        return
    op.execute(
        f"CREATE OR REPLACE FUNCTION autoeff_{name}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is final' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(f"DROP TRIGGER IF EXISTS {name} ON {table}")
    op.execute(f"CREATE TRIGGER {name} BEFORE {operation} ON {table} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION autoeff_{name}()")
