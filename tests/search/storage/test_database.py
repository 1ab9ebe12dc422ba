"""Opening, creating, upgrading, refusing; and what a failing database looks like to a caller."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError
from typer.testing import CliRunner

from autoeff.cli import app
from autoeff.errors import AutoeffError, ExitCode, FailureClass, InputError, StorageError
from autoeff.search.storage import JobState, Proposal, State, Store, database
from autoeff.search.storage.database import Database
from autoeff.search.storage.migrations import configuration
from autoeff.search.storage.tables import REVISION, Base, now

FIXTURES = Path(__file__).parent


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'autoeff.db'}"


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere; this takes the privilege away for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TestOpening:
    def test_absent_folders_and_file_are_made(self, tmp_path: Path) -> None:
        with Store.open(f"sqlite:///{tmp_path}/a b/100%/autoeff.db") as store:
            assert store.jobs() == []
        assert (tmp_path / "a b" / "100%" / "autoeff.db").is_file()

    def test_connections_are_set_for_safety(self, url: str) -> None:
        with closing(Database(url)) as opened, opened.write() as connection:
            pragmas = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
            found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in pragmas]
        assert found == ["wal", 2, 10_000, 1]

    def test_what_was_written_is_there_when_opened_again(self, url: str) -> None:
        with Store.open(url) as store:
            store.create_job("job", {"model": "demo"}, {}, {}, "0" * 64)
        with Store.open(url) as store:
            assert store.job("job").spec == {"model": "demo"}

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("autoeff.db", "no database URL"),
            ("mysql://me:secret@host/autoeff", "not supported"),
            ("postgresql://me:secret@host", "names no database"),
            ("sqlite://", "name a file"),
            ("sqlite:///:memory:", "name a file"),
            ("sqlite:///file:x?mode=memory&uri=true", "name a file"),
            ("sqlite:////proc/autoeff/autoeff.db", "No such file or directory"),
            ("sqlite:////dev/null/autoeff.db", "cannot use"),
            ("sqlite:////tmp", "unable to open database file"),
        ],
    )
    def test_unusable_url_is_refused_in_one_line(self, url: str, says: str) -> None:
        with pytest.raises(InputError, match=says) as caught:
            Store.open(url)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)
        assert caught.value.exit_code == ExitCode.BAD_INPUT

    def test_file_that_is_no_database_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "notes.txt"
        file.write_text("no database " * 100)
        with pytest.raises(InputError, match="file is not a database"):
            Store.open(f"sqlite:///{file}")
        assert file.read_text() == "no database " * 100

    def test_database_that_may_only_be_read_is_refused(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{folder}/autoeff.db"
            Store.open(url).close()
            path_of(url).chmod(0o444)
            Path(folder).chmod(0o555)
            try:
                with unprivileged(), pytest.raises(InputError, match=r"cannot use .* make this one writable"):
                    Store.open(url)
            finally:
                Path(folder).chmod(0o755)

    def test_tables_of_the_same_name_are_not_touched(self, tmp_path: Path) -> None:
        file = tmp_path / "other.db"
        with closing(sqlite3.connect(file)) as raw:
            raw.executescript("CREATE TABLE trial (x); INSERT INTO trial VALUES (7)")
        with pytest.raises(InputError, match="table trial already exists"):
            Store.open(f"sqlite:///{file}")
        with closing(sqlite3.connect(file)) as raw:
            assert raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [("trial",)]

    def test_processes_may_open_a_new_database_at_once(self, url: str, race: Callable[[str, int], list[str]]) -> None:
        code = f"""
import autoeff.search.storage.migrations
from autoeff.search.storage import Store
def run(i):
    Store.open({url!r}).create_job(str(i), {{}}, {{}}, {{}}, "")
"""
        race(code, 6)
        with Store.open(url) as store:
            assert sorted(job.id for job in store.jobs()) == list("012345")

    def test_threads_may_open_new_databases_at_once(self, tmp_path: Path) -> None:
        urls = [f"sqlite:///{tmp_path}/{i % 4}.db" for i in range(8)]
        failed: list[BaseException] = []

        def run(url: str) -> None:
            try:
                Store.open(url).close()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(url,)) for url in urls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []


class TestMigrations:
    def test_models_and_migrations_agree(self, url: str) -> None:
        with closing(Database(url)) as opened, opened.write() as connection:
            command.check(configuration(connection))

    def test_indices_and_checks_agree(self, url: str) -> None:
        # `check` compares neither the conditions of indices nor checks.
        modelled = create_engine("sqlite://")
        Base.metadata.create_all(modelled)
        with closing(Database(url)) as opened, opened.read() as connection, modelled.connect() as model:
            indices = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
            assert connection.exec_driver_sql(indices).all() == model.exec_driver_sql(indices).all()
            for table in Base.metadata.tables:
                found = [
                    sorted((check["name"], check["sqltext"]) for check in inspect(one).get_check_constraints(table))
                    for one in (connection, model)
                ]
                assert found[0] == found[1]
        modelled.dispose()

    def test_newest_migration_is_the_one_that_opening_looks_for(self, url: str) -> None:
        with closing(Database(url)) as opened, opened.write() as connection:
            assert ScriptDirectory.from_config(configuration(connection)).get_heads() == [REVISION]

    @pytest.mark.parametrize("dump", sorted(FIXTURES.glob("revision_*.sql")), ids=lambda path: path.stem)
    def test_database_of_every_released_revision_opens_and_goes_on(
        self, dump: Path, url: str, proposal: Callable[..., Proposal], me: str
    ) -> None:
        with closing(sqlite3.connect(path_of(url))) as raw:
            raw.executescript(dump.read_text())
        with Store.open(url) as store:
            assert store.job("first").state is JobState.RUNNING
            assert [trial.state for trial in store.trials("first")] == [State.SUCCEEDED, State.FAILED, State.QUARANTINED, State.QUEUED]
            row = store.trial("first", 0).to_json()
            assert row["measurements"]["kl"] == {
                "value": 0.125,
                "unit": "nats/token",
                "split": "search",
                "tokens": 2048,
                "spread": 0.5,
                "method": "measured",
            }
            fence = store.acquire_coordinator("first", me, 60)
            store.propose("first", fence, proposal(4))
            assert store.events("first")[-1].kind == "trial.proposed"

    def test_older_file_is_copied_before_it_is_upgraded(self, url: str) -> None:
        with closing(sqlite3.connect(path_of(url))) as raw:
            raw.executescript((FIXTURES / "revision_0001.sql").read_text())
        with closing(Database(url)) as opened:
            assert opened.upgraded_from == "0001"
        with closing(sqlite3.connect(f"{path_of(url)}.0001.bak")) as raw:
            assert raw.execute("SELECT version_num FROM autoeff_alembic").fetchall() == [("0001",)]
            assert raw.execute("SELECT count(*) FROM trial").fetchall() == [(4,)]
        with closing(Database(url)) as opened, opened.read() as connection:
            assert opened.upgraded_from == REVISION
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []

    def test_other_tables_in_the_database_are_left_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "shared.db"
        with closing(sqlite3.connect(file)) as raw:
            raw.execute("CREATE TABLE studies (x)")
        with closing(Database(f"sqlite:///{file}")) as opened, opened.write() as connection:
            command.check(configuration(connection))  # would propose to drop it
            assert inspect(connection).has_table("studies")

    def test_database_of_a_newer_version_is_refused_and_left_alone(self, url: str) -> None:
        Store.open(url).close()
        with closing(sqlite3.connect(path_of(url))) as raw, raw:
            raw.execute("UPDATE autoeff_alembic SET version_num = '9999'")
        with pytest.raises(InputError, match="revision '9999', newer than this autoeff knows"):
            Store.open(url)

    def test_migration_that_fails_half_way_leaves_nothing(self, url: str) -> None:
        with closing(sqlite3.connect(path_of(url))) as raw:
            raw.execute("CREATE TABLE event (x)")  # the last one to be made
        with pytest.raises(InputError, match="event already exists"):
            Store.open(url)
        with closing(sqlite3.connect(path_of(url))) as raw:
            assert raw.execute("SELECT name FROM sqlite_master").fetchall() == [("event",)]


class TestFailing:
    def test_full_disk_is_one_line_and_leaves_no_half_transaction(
        self, store: Store, job: tuple[str, int], proposal: Callable[..., Proposal]
    ) -> None:
        store.propose(*job, proposal(0))
        with store._database.write() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(AutoeffError, match="database or disk is full; free some space") as caught:
            store.propose(*job, proposal(1, sampler_state={"x": "y" * 100_000}))
        assert type(caught.value) is StorageError
        assert "\n" not in str(caught.value)
        assert store.counts("job").trials == 1
        with store._database.write() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        store.propose(*job, proposal(1))
        assert [trial.number for trial in store.trials("job")] == [0, 1]

    def test_long_locked_database_is_one_line(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "BUSY_MS", 50)
        with Store.open(url) as store, closing(sqlite3.connect(path_of(url))) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(AutoeffError, match="database is locked; another process has been writing"):
                store.create_job("job", {}, {}, {}, "0" * 64)
            assert store.jobs() == []  # readers do not wait
            Store.open(url).close()  # nor does opening what needs no upgrade
            other.rollback()
            store.create_job("job", {}, {}, {}, "0" * 64)

    def test_fault_of_ours_keeps_its_trace(self, url: str) -> None:
        with closing(Database(url)) as opened, pytest.raises(IntegrityError), opened.write() as connection:
            connection.exec_driver_sql("INSERT INTO trial VALUES ('nobody', 0, 1, 'given', NULL, 1, 1.0, '{}', NULL, 0, NULL, NULL)")


class TestServer:
    @pytest.fixture
    def url(self, servers: ModuleType, postgres: Any) -> Iterator[str]:
        """An empty database of a PostgreSQL server."""
        made = servers.new_database(postgres)
        yield made
        servers.drop_database(postgres, made)

    def test_empty_database_gets_its_tables_from_whoever_is_first(self, url: str, race: Callable[[str, int], list[str]]) -> None:
        code = f"""
import autoeff.search.storage.migrations
from autoeff.search.storage import Store
def run(i):
    Store.open({url!r}).create_job(str(i), {{}}, {{}}, {{}}, "")
"""
        race(code, 4)
        with Store.open(url) as store:
            assert sorted(job.id for job in store.jobs()) == list("0123")
        with closing(Database(url)) as opened, opened.write() as connection:
            command.check(configuration(connection))

    def test_older_database_is_upgraded_only_on_request(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            command.upgrade(configuration(connection), "0001")
        engine.dispose()
        with pytest.raises(InputError, match=r"revision '0001', older than this autoeff needs .* `autoeff db upgrade`"):
            Store.open(url)
        monkeypatch.setenv("AUTOEFF_DATABASE_URL", url)
        done = CliRunner().invoke(app, ["db", "upgrade"])
        assert (done.exit_code, f"was upgraded from 0001: revision {REVISION}" in done.stdout) == (0, True), done.output
        assert "is up to date" in CliRunner().invoke(app, ["db", "upgrade"]).stdout
        Store.open(url).close()

    def test_database_of_a_newer_version_is_refused(self, url: str) -> None:
        with closing(Database(url)) as opened, opened.write() as connection:
            connection.exec_driver_sql("UPDATE autoeff_alembic SET version_num = '9999'")
        with pytest.raises(InputError, match="revision '9999', newer than this autoeff knows"):
            Store.open(url)

    def test_text_that_postgresql_cannot_store_is_mended(self, url: str, proposal: Callable[..., Proposal], me: str) -> None:
        with Store.open(url) as store:
            store.create_job("job", {}, {}, {}, "")
            ref = store.propose("job", store.acquire_coordinator("job", me, 60), proposal(0), claim_for=me, ttl_s=60)
            assert ref.claim is not None
            store.fail(ref.claim, FailureClass.CRASH, "a\0b", "c\0\ud800d")
            (attempt,) = store.attempts(ref.evaluation_id)
            assert (attempt.failure and attempt.failure.message, attempt.log) == ("a\ufffdb", "c\ufffd?d")

    def test_transaction_that_was_undone_for_another_one_is_made_again(
        self, url: str, postgres: Any, proposal: Callable[..., Proposal], me: str
    ) -> None:
        with Store.open(url) as store:
            store.create_job("job", {}, {}, {}, "")
            fence = store.acquire_coordinator("job", me, 60)
            other = psycopg.connect(url.replace("+psycopg", ""))
            other.execute("SELECT 1 FROM job FOR UPDATE")  # for longer than a lock is waited for
            release = threading.Timer(4.0, other.close)
            release.start()
            assert store.propose("job", fence, proposal(0)).number == 0
            release.join()
            assert [trial.number for trial in store.trials("job")] == [0]

    def test_absent_server_is_one_line_without_the_password(self, servers: ModuleType) -> None:
        with pytest.raises(StorageError, match="connection") as caught:
            Store.open(f"postgresql+psycopg://me:secret@127.0.0.1:{servers.free_port()}/autoeff")
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_lost_connection_is_one_line_and_the_next_call_connects_again(self, url: str, servers: ModuleType, postgres: Any) -> None:
        def lose(store: Store) -> None:
            with store.database.write() as connection:
                (mine,) = connection.exec_driver_sql("SELECT pg_backend_pid()").one()
                with closing(psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True)) as other:
                    other.execute("SELECT pg_terminate_backend(%s)", [mine])
                connection.exec_driver_sql("SELECT 1")

        with Store.open(url) as store:
            with pytest.raises(StorageError):
                lose(store)
            assert store.jobs() == []


def test_every_dialect_has_a_clock_in_utc_seconds() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    assert str(now().compile(dialect=dialect)) == "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
