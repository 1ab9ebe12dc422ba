"""Replies that are given again: what a request with an `Idempotency-Key` was answered the first time.

They are written by `Store.create_job`, in the transaction that does what the reply says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import delete, select

from autoeff.search.storage.database import Database
from autoeff.search.storage.tables import IdempotencyRow, now

__all__ = ["KEPT_S", "Given", "Replies"]

KEPT_S = 24 * 3600.0
"""How long a reply is given again."""


class Given(NamedTuple):
    """A stored reply, and the hash of the request that it answered."""

    request_hash: str
    status: int
    body: Mapping[str, Any]


class Replies:
    """The stored replies of a database.

    Args:
        database: Open; whoever opened it closes it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, key_prefix: str, idempotency_key: str) -> Given | None:
        """The reply to this key's request of that name; None where there is none, or none that still counts."""
        query = select(IdempotencyRow.request_hash, IdempotencyRow.status, IdempotencyRow.body)
        mine = query.where(IdempotencyRow.key_prefix == key_prefix, IdempotencyRow.idempotency_key == idempotency_key)
        with self._database.read() as connection:
            row = connection.execute(mine.where(IdempotencyRow.expires_at > now())).one_or_none()
        return None if row is None else Given(*row)

    def sweep(self) -> None:
        """Removes replies that no longer count."""
        with self._database.write() as connection:
            connection.execute(delete(IdempotencyRow).where(IdempotencyRow.expires_at <= now()))
