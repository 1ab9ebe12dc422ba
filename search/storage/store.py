"""What the search remembers, and who may write it.

Coordinators and workers hold leases with a fencing token: a write carries the token under which it was begun, and counts only while
that is the newest. So a process that was paused, cut off or thought dead can come back at any moment and do no harm. Every method
is one transaction.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from autoeff.search.storage.database import Database
from autoeff.search.storage.driving import Driving
from autoeff.search.storage.retries import Retries
from autoeff.search.storage.trials import Trials
from autoeff.search.storage.work import Work
from autoeff.search.storage.workers import Workers

__all__ = ["Store"]


class Store(Driving, Trials, Retries, Work, Workers):
    """The database of jobs, trials and their results.

    Safe to share between threads, and to open in any number of processes. A database that fails (full disk, locked for long)
    raises `StorageError`; the transaction under way then did not happen.
    """

    @classmethod
    def open(cls, url: str) -> Self:
        """Opens the database at `url`, made where absent. A SQLite file of an older revision is upgraded.

        Args:
            url: Such as `sqlite:////home/me/autoeff.db` or `postgresql+psycopg://me@host/autoeff`.

        Raises:
            InputError: The URL cannot be used: unwritable, no database, of a newer version, or on a server and of an older one.
            StorageError: The server does not answer.
        """
        return cls(Database(url))

    @property
    def database(self) -> Database:
        """For what else is kept there."""
        return self._database

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
