"""Cursors: where a page ended, signed, so that nobody takes them apart or makes one."""

from __future__ import annotations

from typing import Any

from itsdangerous import BadData, URLSafeSerializer

from autoeff.api.problems import ApiError, ProblemItem

__all__ = ["Cursors"]


class Cursors:
    """Writes and reads cursors.

    Args:
        secret: Shared by all servers in front of one database.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def write(self, listing: str, last: Any) -> str:
        """The cursor that goes on after `last` (JSON) in `listing`, which names what is listed, filters included."""
        return self._serializer(listing).dumps(last)

    def read(self, listing: str, cursor: str | None) -> Any:
        """What `write` was given for the same listing; None without a cursor.

        Raises:
            ApiError: It is of another listing, or not ours.
        """
        if cursor is None:
            return None
        try:
            return self._serializer(listing).loads(cursor)
        except (BadData, ValueError):
            message = "the cursor is not one that this listing gave; start without one"
            raise ApiError(422, "invalid-input", message, errors=[ProblemItem(detail=message, parameter="cursor")]) from None

    def _serializer(self, listing: str) -> URLSafeSerializer:
        return URLSafeSerializer(self._secret, salt=f"autoeff.cursor.{listing}")
