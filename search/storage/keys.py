"""Stored keys of the API; never a secret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, and_, func, insert, or_, select, update

from autoeff.errors import NotFound
from autoeff.search.keys import Key, Minted, check_scopes, mint
from autoeff.search.storage.database import Database
from autoeff.search.storage.tables import ApiKeyRow, now

__all__ = ["KeyRing"]

_USED_S = 60.0
"""The last use of a key is known to the minute: a call that only reads should not have to write."""
_DAY_S = 86_400.0
_KEY = select(ApiKeyRow.__table__)
_GOOD = and_(ApiKeyRow.revoked_at.is_(None), or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > now()))


class KeyRing:
    """The keys of a database.

    Args:
        database: Open; whoever opened it closes it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def empty(self) -> bool:
        """Whether no key was ever made."""
        with self._database.read() as connection:
            return connection.execute(select(func.count()).select_from(ApiKeyRow)).scalar_one() == 0

    def make(self, name: str, owner: str, scopes: Sequence[str], days: int | None = None) -> tuple[Key, Minted]:
        """Makes a key and stores its hash; its text is in the answer and nowhere else.

        Args:
            name: For people.
            owner: Whose jobs it sees.
            scopes: Of `SCOPES`.
            days: After which it ends; None never.

        Raises:
            InputError: An unknown scope, or a name or an owner that cannot be one.
        """
        scopes = check_scopes(name, owner, scopes)
        minted = mint()
        ends = None if days is None else now() + days * _DAY_S
        values = {"prefix": minted.prefix, "name": name, "sha256": minted.sha256, "scopes": list(scopes), "owner": owner}
        with self._database.write() as connection:
            connection.execute(insert(ApiKeyRow).values(**values, created_at=now(), expires_at=ends))
            row = connection.execute(_KEY.where(ApiKeyRow.prefix == minted.prefix)).one()
        return _key(row), minted

    def all(self) -> list[Key]:
        """Every key, the newest first, revoked ones too."""
        with self._database.read() as connection:
            return [_key(row) for row in connection.execute(_KEY.order_by(ApiKeyRow.created_at.desc(), ApiKeyRow.prefix))]

    def good(self, prefix: str) -> tuple[Key, str] | None:
        """The key of this prefix and its hash, if it is neither revoked nor expired."""
        with self._database.read() as connection:
            row = connection.execute(_KEY.where(ApiKeyRow.prefix == prefix, _GOOD)).one_or_none()
        return None if row is None else (_key(row), row.sha256)

    def used(self, prefix: str) -> None:
        """Notes that a key was used just now."""
        stale = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < now() - _USED_S)
        mine = and_(ApiKeyRow.prefix == prefix, stale)
        with self._database.read() as connection:
            if connection.execute(select(ApiKeyRow.prefix).where(mine)).first() is None:
                return
        with self._database.write() as connection:
            connection.execute(update(ApiKeyRow).where(mine).values(last_used_at=now()))

    def revoke(self, prefix: str) -> Key:
        """Ends a key for ever; one that is revoked already stays so.

        Raises:
            NotFound: There is none of this prefix.
        """
        with self._database.write() as connection:
            mine = and_(ApiKeyRow.prefix == prefix, ApiKeyRow.revoked_at.is_(None))
            connection.execute(update(ApiKeyRow).where(mine).values(revoked_at=now()))
            row = connection.execute(_KEY.where(ApiKeyRow.prefix == prefix)).one_or_none()
        if row is None:
            raise NotFound(f"there is no key {prefix[:20]!r}; `autoeff keys ls` lists them by the eight digits after ae_")
        return _key(row)


def _key(row: Row[Any]) -> Key:
    return Key(
        prefix=row.prefix, name=row.name, owner=row.owner, scopes=tuple(row.scopes), created_at=row.created_at, expires_at=row.expires_at,
        revoked_at=row.revoked_at, last_used_at=row.last_used_at,
    )  # fmt: skip
