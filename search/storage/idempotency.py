"""Replies that are given again: what a request with an `Idempotency-Key` was answered the first time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, select

from autoeff.search.storage.database import Database
from autoeff.search.storage.tables import IdempotencyRow, now

__all__ = ["KEPT_S", "Replies", "Reply", "keep"]

KEPT_S = 24 * 3600.0


@dataclass(frozen=True)
class Reply:
    """A stored answer.

    Attributes:
        request_hash: Of the request that it was the answer to.
    """

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

    def find(self, key_id: int, idempotency_key: str) -> Reply | None:
        """The reply to this key's request of that name, if it is not older than a day."""
        with self._database.read() as connection:
            return _find(connection, key_id, idempotency_key)

    def sweep(self) -> None:
        """Removes replies that are too old to be given again."""
        with self._database.write() as connection:
            connection.execute(delete(IdempotencyRow).where(IdempotencyRow.expires_at <= now()))


def keep(connection: Connection, key_id: int, idempotency_key: str, reply: Reply) -> Reply | None:
    """Stores a reply in the transaction that does what it says; returns the stored one instead where there is one already."""
    mine = and_(IdempotencyRow.key_id == key_id, IdempotencyRow.idempotency_key == idempotency_key)
    connection.execute(delete(IdempotencyRow).where(mine, IdempotencyRow.expires_at <= now()))
    if (found := _find(connection, key_id, idempotency_key)) is not None:
        return found
    values = {"request_hash": reply.request_hash, "status": reply.status, "body": dict(reply.body), "expires_at": now() + KEPT_S}
    connection.execute(insert(IdempotencyRow).values(key_id=key_id, idempotency_key=idempotency_key, **values))
    return None


def _find(connection: Connection, key_id: int, idempotency_key: str) -> Reply | None:
    query = select(IdempotencyRow.request_hash, IdempotencyRow.status, IdempotencyRow.body)
    mine = and_(IdempotencyRow.key_id == key_id, IdempotencyRow.idempotency_key == idempotency_key, IdempotencyRow.expires_at > now())
    row = connection.execute(query.where(mine)).one_or_none()
    return None if row is None else Reply(*row)
