"""The one place that opens databases and transactions, and translates what drivers raise.

SQLite: writers begin with BEGIN IMMEDIATE (a deferred transaction that turns into a writer fails at once, whatever the timeout) and
commit with synchronous=FULL, since WAL with NORMAL may lose a committed transaction when the power fails.

PostgreSQL: READ COMMITTED, in which every change of what others may change is a compare-and-set or follows a row lock; readers see one
snapshot. Statements, locks and idle transactions have deadlines, so that nobody waits for a process that hangs.
"""

from __future__ import annotations

import functools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import URL, Connection, Double, Engine, Row, bindparam, column, create_engine, event, inspect, make_url, select, table, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, DisconnectionError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from autoeff.errors import AutoeffError, InputError, StorageError
from autoeff.search.storage.tables import REVISION, Base, now

__all__ = ["VERSION_TABLE", "Database", "InTheWay", "again", "insert_absent", "storable"]

VERSION_TABLE = "autoeff_alembic"
BUSY_MS = 10_000
"""How long a writer waits for another one; a transaction takes milliseconds."""
_JOURNAL_BYTES = 64 << 20
_CONNECT_S = 5
_IDLE_S = 1.0  # a connection that was not used for longer is asked whether it still is one: a whole round trip
_SESSION = {"statement_timeout": "10s", "lock_timeout": "3s", "idle_in_transaction_session_timeout": "30s", "TimeZone": "UTC"}
_MIGRATION_LOCK = 7_217_504_390_125  # of PostgreSQL's advisory locks: one process migrates
_MIGRATING = threading.Lock()
"""Alembic's context is global to the process."""
_IN_THE_WAY = ("40001", "40P01", "55P03")  # serialisation, deadlock, a lock waited for too long: the transaction was undone as a whole
_TRIES = 5
_EXAMPLES = "sqlite:////home/me/autoeff.db or postgresql+psycopg://me@host/autoeff"


class Database:
    """An open database at this version's revision. Safe to share between threads.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` (the file and its folder are made where absent) or
            `postgresql+psycopg://user:password@host/name`. An empty one gets its tables.
        upgrade: Whether one of an older revision is upgraded. A SQLite file always is, after a copy of it was made.

    Raises:
        InputError: Not a URL of a database that can be used, an unwritable path, a file that is no database, or a database
            of a newer version, or of an older one that is not to be upgraded here.
        StorageError: The server does not answer, or another process writes for long.
    """

    def __init__(self, url: str, *, upgrade: bool = False) -> None:
        self._location = _checked(url)
        self._sqlite = self._location.get_backend_name() == "sqlite"
        self.name = str(self._location.database) if self._sqlite else self._location.render_as_string(hide_password=True)
        if self._sqlite:
            # One connection writes, so that threads of this process queue in line instead of polling the file lock.
            self._writer = _sqlite(self._location, "BEGIN IMMEDIATE", pool_size=1, max_overflow=0, pool_timeout=3 * BUSY_MS / 1000)
            self._reader = _sqlite(self._location, "BEGIN")
        else:
            self._writer = _postgresql(self._location)
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        try:
            if self._sqlite:
                self._make_file()
            self.upgraded_from = self._upgrade(upgrade or self._sqlite)
        except (sqlite3.DatabaseError, DBAPIError, OSError) as error:
            self.close()
            if _is_busy(error) or (not self._sqlite and isinstance(error, OperationalError)):
                raise self._translated(error) from error
            remedy = "choose another file or make this one writable" if self._sqlite else "give the role the right to make tables there"
            raise InputError(f"cannot use {self.name} as a database: {_cause(error)}; {remedy}") from error
        except BaseException:
            self.close()
            raise

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write: all of it happens or nothing.

        Raises:
            StorageError: The database failed. If it did while committing, the transaction may have happened.
        """
        with self._failures(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot; waits for no writer. Raises as `write`."""
        with self._failures(), self._reader.begin() as connection:
            yield connection

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            # Their siblings (integrity, programming) are faults of ours and keep their trace.
            if type(error) not in (OperationalError, DatabaseError, InternalError) and not error.connection_invalidated:
                raise
            raise self._translated(error) from error
        except PoolTimeout as error:
            raise StorageError(f"database {self.name}: every connection has been in use for long") from error

    def _translated(self, error: Exception) -> AutoeffError:
        cause = _cause(error)
        if getattr(getattr(error, "orig", None), "sqlstate", None) in _IN_THE_WAY:
            return InTheWay(f"database {self.name}: {cause}")
        remedy = "what was committed is kept; `autoeff resume` goes on from there"
        if "full" in cause:
            remedy = f"free some space; {remedy}"
        elif _is_busy(error):
            remedy = f"another process has been writing for {BUSY_MS / 1000:g} s; {remedy}"
        return StorageError(f"database {self.name}: {cause}; {remedy}")

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

    def _upgrade(self, allowed: bool) -> str | None:
        """Makes or upgrades the tables; returns the revision before, None where there were no tables."""
        with self._reader.begin() as connection:
            if (found := _revision(connection)) == REVISION:
                return found
        # Keys are not checked while tables are made anew: SQLite cannot do so inside a transaction.
        engine = _sqlite(self._location, "BEGIN IMMEDIATE", foreign_keys=False) if self._sqlite else self._writer
        try:
            with _MIGRATING, engine.begin() as connection:
                if not self._sqlite:
                    connection.execute(text("SET LOCAL statement_timeout = 0"))
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
                if (found := _revision(connection)) == REVISION:  # another process was faster
                    return found
                from autoeff.search.storage.migrations import check_known, upgrade  # Alembic takes 0.3 s to import and is rarely needed

                try:
                    check_known(connection, found)
                except LookupError:
                    raise InputError(
                        f"database {self.name} has revision {found!r}, newer than this autoeff knows ({REVISION}); install a newer autoeff"
                    ) from None
                if found is not None and not allowed:
                    raise InputError(
                        f"database {self.name} has revision {found!r}, older than this autoeff needs ({REVISION}); "
                        "stop what uses it, make a backup and run `autoeff db upgrade`"
                    )
                if found is not None and self._sqlite:
                    self._back_up(found)
                upgrade(connection)
                if self._sqlite and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
                    raise AutoeffError(f"database {self.name}: upgrading it from {found} would break a reference; it was left as it is")
                return found
        finally:
            if self._sqlite:
                engine.dispose()

    def _back_up(self, revision: str) -> None:
        """A copy beside the file, from the state before the transaction under way."""
        copy = Path(f"{self.name}.{revision}.bak")
        partial = Path(f"{copy}.partial")
        partial.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.name)) as source, closing(sqlite3.connect(partial)) as target:
            source.backup(target)
        partial.replace(copy)


class InTheWay(StorageError):
    """Another transaction was in the way; this one was undone and can be made again."""


P = ParamSpec("P")
R = TypeVar("R")


def again(method: Callable[P, R]) -> Callable[P, R]:
    """Makes a transaction anew that was undone since another one was in its way: PostgreSQL breaks deadlocks so."""

    @functools.wraps(method)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(_TRIES - 1):
            with suppress(InTheWay):
                return method(*args, **kwargs)
        return method(*args, **kwargs)

    return repeated


def insert_absent(
    connection: Connection, into: type[Base], values: Mapping[str, Any], stamped: str | None = None, after_s: float = 0.0
) -> Row[Any] | None:
    """Inserts a row and returns its primary key; None where a unique key of it is taken.

    Args:
        connection: Of a transaction.
        into: The table.
        values: By column.
        stamped: Column that gets the present time,
        after_s: and so many seconds more.
    """
    after = {} if stamped is None else {"after_s": after_s}
    return connection.execute(_absent(connection.dialect.name, into, stamped), {**values, **after}).one_or_none()


@functools.cache
def _absent(dialect: str, into: type[Base], stamped: str | None) -> Any:
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
    statement = insert(into).on_conflict_do_nothing().returning(*inspect(into).primary_key)
    return statement if stamped is None else statement.values({stamped: now() + bindparam("after_s", type_=Double)})


def storable(told: str) -> str:
    """The text without what PostgreSQL cannot store: NUL characters and lone surrogates."""
    return told.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(select(column("version_num")).select_from(table(VERSION_TABLE))).scalar()


def _checked(url: str) -> URL:
    try:
        location = make_url(url)
    except ArgumentError:
        raise InputError(f"{url!r} is no database URL; write for example {_EXAMPLES}") from None
    shown = location.render_as_string(hide_password=True)
    if location.drivername in ("postgresql", "postgresql+psycopg"):
        if not location.database:
            raise InputError(f"database {shown}: the URL names no database; write for example {_EXAMPLES}")
        return location.set(drivername="postgresql+psycopg")
    if location.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise InputError(f"database {shown}: {location.drivername} is not supported; write for example {_EXAMPLES}")
    if not location.database or location.database.startswith((":memory:", "file:")):
        raise InputError(f"database {shown}: results must outlive the process; name a file, such as sqlite:////home/me/autoeff.db")
    return location.set(database=str(Path(location.database).absolute()))


def _json(value: object) -> str:
    """In the order in which it was given, which counts where the last of several globs holds."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _sqlite(url: URL, begin: str, *, foreign_keys: bool = True, **settings: Any) -> Engine:
    engine = create_engine(url, json_serializer=_json, **settings)
    keys = f"foreign_keys={'ON' if foreign_keys else 'OFF'}"

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions on its own; the listener below does
        for pragma in (f"busy_timeout={BUSY_MS}", "synchronous=FULL", keys, f"journal_size_limit={_JOURNAL_BYTES}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _postgresql(url: URL) -> Engine:
    options = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
    try:
        engine = create_engine(
            url,
            json_serializer=_json,
            pool_size=8,
            max_overflow=8,
            connect_args={"connect_timeout": _CONNECT_S, "application_name": "autoeff", "options": options},
        )
    except ImportError:
        raise InputError('PostgreSQL needs psycopg; install it with pip install "psycopg[binary]"') from None

    @event.listens_for(engine, "checkin")
    def _used(connection: object, record: Any) -> None:
        record.info["used"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _alive(connection: Any, record: Any, proxy: object) -> None:
        if time.monotonic() - record.info.get("used", 0.0) > _IDLE_S:
            try:
                engine.dialect.do_ping(connection)
            except Exception as error:
                raise DisconnectionError from error

    return engine


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return str(error.strerror)
    return " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())


def _is_busy(error: Exception) -> bool:
    return "locked" in _cause(error)
