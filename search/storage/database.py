"""The one place that opens databases and transactions, and translates what drivers raise.

SQLite: writers begin with BEGIN IMMEDIATE (a deferred transaction that turns into a writer fails at once, whatever the timeout) and
commit with synchronous=FULL, since WAL with NORMAL may lose a committed transaction when the power fails.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, column, create_engine, event, inspect, make_url, select, table
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from autoeff.errors import AutoeffError, InputError
from autoeff.search.storage.tables import REVISION
from autoeff.spaces.configuration import canonical_json

__all__ = ["VERSION_TABLE", "Database"]

VERSION_TABLE = "autoeff_alembic"
BUSY_MS = 10_000
"""How long a writer waits for another one; a transaction takes milliseconds."""
_JOURNAL_BYTES = 64 << 20
_MIGRATING = threading.Lock()
"""Alembic's context is global to the process."""


class Database:
    """An open database at this version's revision. Safe to share between threads.

    Args:
        url: `sqlite:///relative.db` or `sqlite:////absolute.db`; the file and its folder are made where absent.

    Raises:
        InputError: Not a URL of a database that can be used, an unwritable path, a file that is no database, or a database
            of a newer version.
    """

    def __init__(self, url: str) -> None:
        location = _checked(url)
        self.name = str(location.database)
        # One connection writes, so that threads of this process queue in line instead of polling the file lock.
        self._writer = _engine(location, "BEGIN IMMEDIATE", pool_size=1, max_overflow=0, pool_timeout=3 * BUSY_MS / 1000)
        self._reader = _engine(location, "BEGIN")
        try:
            self._make_file()
            with self._writer.begin() as connection:
                self._upgrade(connection)
        except (sqlite3.DatabaseError, DatabaseError, OSError) as error:
            self.close()
            if _is_busy(error):
                raise self._translated(error) from error
            remedy = "choose another file or make this one writable"
            raise InputError(f"cannot use {self.name} as a database: {_cause(error)}; {remedy}") from error
        except BaseException:
            self.close()
            raise

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write: all of it happens or nothing."""
        with self._failures(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot; waits for no writer."""
        with self._failures(), self._reader.begin() as connection:
            yield connection

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            # Their siblings (integrity, programming) are faults of ours and keep their trace.
            if type(error) not in (OperationalError, DatabaseError):
                raise
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> AutoeffError:
        cause = _cause(error)
        remedy = "what was committed is kept; `autoeff resume` goes on from there"
        if "full" in cause:
            remedy = f"free some space; {remedy}"
        elif _is_busy(error):
            remedy = f"another process has been writing for {BUSY_MS / 1000:g} s; {remedy}"
        return AutoeffError(f"database {self.name}: {cause}; {remedy}")

    def _make_file(self) -> None:
        Path(self.name).parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + BUSY_MS / 1000
        with closing(sqlite3.connect(self.name)) as raw:
            while True:
                try:
                    (mode,) = raw.execute("PRAGMA journal_mode=WAL").fetchone()
                    break
                except sqlite3.OperationalError as error:
                    # Where two processes switch the mode at once, SQLite answers "locked" without waiting.
                    if not _is_busy(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        if mode != "wal":
            raise InputError(f"{self.name}: this file system cannot hold a database in WAL mode; put it on a local disk")

    def _upgrade(self, connection: Connection) -> None:
        found = None
        if inspect(connection).has_table(VERSION_TABLE):
            found = connection.execute(select(column("version_num")).select_from(table(VERSION_TABLE))).scalar()
        if found == REVISION:
            return
        with _MIGRATING:
            from autoeff.search.storage.migrations import upgrade  # Alembic takes 0.3 s to import and is rarely needed

            try:
                upgrade(connection, found)
            except LookupError:
                raise InputError(
                    f"database {self.name} has revision {found!r}, newer than this autoeff knows ({REVISION}); install a newer autoeff"
                ) from None


def _checked(url: str) -> URL:
    try:
        location = make_url(url)
    except ArgumentError:
        raise InputError(f"{url!r} is no database URL; write for example sqlite:////home/me/autoeff.db") from None
    shown = location.render_as_string(hide_password=True)
    if location.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise InputError(f"database {shown}: {location.drivername} is not supported; write for example sqlite:////home/me/autoeff.db")
    if not location.database or location.database.startswith((":memory:", "file:")):
        raise InputError(f"database {shown}: results must outlive the process; name a file, such as sqlite:////home/me/autoeff.db")
    return location.set(database=str(Path(location.database).absolute()))


def _engine(url: URL, begin: str, **settings: Any) -> Engine:
    engine = create_engine(url, json_serializer=canonical_json, **settings)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions on its own; the listener below does
        for pragma in (f"busy_timeout={BUSY_MS}", "synchronous=FULL", "foreign_keys=ON", f"journal_size_limit={_JOURNAL_BYTES}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    return str(error.orig if isinstance(error, DatabaseError) else error)


def _is_busy(error: Exception) -> bool:
    return "locked" in _cause(error)
