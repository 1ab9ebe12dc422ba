"""A run directory leads back to its job, is made whole or not at all, and never over something that exists."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from autoeff.errors import InputError
from autoeff.search.runs import FILE, new_run, open_run, write_file
from autoeff.search.settings import Settings
from autoeff.search.storage.store import Store

JOB = "0123456789ab"


def create_run(out: Path, job_id: str, database: str) -> Path:
    with new_run(out, job_id, database) as folder:
        pass
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def database(settings: Settings) -> str:
    """A database with one job."""
    with Store.open(settings.database) as store:
        store.create_job(JOB, {}, {}, {}, "digest")
    return settings.database


def refused(ref: str | Path, settings: Settings) -> str:
    with pytest.raises(InputError) as caught:
        open_run(ref, settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("nested", ["run", "deep/er/run"])
def test_a_run_is_found_by_its_directory_and_by_its_job_id(tmp_path: Path, nested: str, settings: Settings, database: str) -> None:
    folder = create_run(tmp_path / nested, JOB, database)
    assert [path.name for path in folder.iterdir()] == [FILE]
    for ref, found_folder in ((folder, folder), (str(folder), folder), (JOB, None)):
        run = open_run(ref, settings)
        with run.store as store:
            assert (run.job_id, run.folder) == (JOB, found_folder)
            assert store.job(JOB).id == JOB


def test_a_run_opens_its_own_database_wherever_home_is_now(tmp_path: Path, database: str) -> None:
    folder = create_run(tmp_path / "run", JOB, database)
    with open_run(folder, Settings(home=tmp_path / "elsewhere")).store as store:
        assert store.job(JOB).id == JOB
    assert not (tmp_path / "elsewhere").exists()


def test_a_relative_database_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = create_run(Path("run"), JOB, "sqlite:///here.db")
    assert folder == tmp_path / "run"
    assert json.loads((folder / FILE).read_text())["database"] == f"sqlite:///{tmp_path / 'here.db'}"


@pytest.mark.parametrize("existing", ["folder", "empty", "file", "dangling"])
def test_whatever_exists_is_left_alone(tmp_path: Path, existing: str) -> None:
    out = tmp_path / "out"
    if existing in ("folder", "empty"):
        out.mkdir()
    if existing == "folder":
        (out / "result").write_text("earlier")
    if existing == "file":
        out.write_text("earlier")
    if existing == "dangling":
        out.symlink_to(tmp_path / "nowhere")
    before = sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="exists already"):
        create_run(out, JOB, "sqlite:////x.db")
    assert sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*")) == before


def test_a_directory_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the run directory .*Not a directory"):
        create_run(tmp_path / "file" / "run", JOB, "sqlite:////x.db")


def test_a_read_only_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match="Read-only file system"):
        create_run(tmp_path / "run", JOB, "sqlite:////x.db")


def test_a_disk_that_fills_leaves_no_half_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        create_run(tmp_path / "run", JOB, "sqlite:////x.db")
    assert list(tmp_path.iterdir()) == []


def test_a_run_appears_only_once_its_job_is_stored(tmp_path: Path) -> None:
    def start() -> None:
        with new_run(tmp_path / "run", JOB, "sqlite:////x.db") as folder:
            assert not folder.exists()
            raise RuntimeError("the job could not be stored")

    with pytest.raises(RuntimeError, match="not be stored"):
        start()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"first")
    write_file(path, b"second")
    assert path.read_bytes() == b"second"

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="I/O error"):
        write_file(path, b"third")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"second"]


def test_format_1_is_read(root: Path, tmp_path: Path, settings: Settings, database: str) -> None:
    fixture = json.loads((root / "tests" / "fixtures" / "run-1" / FILE).read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text(json.dumps(fixture | {"database": database}))
    with open_run(tmp_path / "run", settings).store as store:
        assert store.job(fixture["job"]).id == JOB


def test_a_run_whose_database_is_gone_names_it(root: Path, settings: Settings) -> None:
    line = refused(root / "tests" / "fixtures" / "run-1", settings)
    assert "/var/lib/autoeff/autoeff.db" in line


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "damaged"),
        ('{"format": 1, "job": "0123', "damaged"),
        ('{"format": 1, "job": 5, "database": "sqlite:////x.db"}', "damaged"),
        ('{"format": 1}', "damaged"),
        ("[1]", "damaged"),
        ("\x00\xff", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"format": 2, "job": "x", "database": "y"}', "format 2"),
        ('{"format": "one", "job": "x", "database": "y"}', "format 'one'"),
        ('{"format": 1, "job": "x", "database": "nonsense"}', "no database URL"),
    ],
)
def test_a_damaged_or_foreign_run_file_is_one_line(tmp_path: Path, text: str, word: str, settings: Settings) -> None:
    (tmp_path / FILE).write_text(text)
    assert word in refused(tmp_path, settings)


def test_what_is_no_run_is_one_line(tmp_path: Path, settings: Settings, database: str) -> None:
    create_run(tmp_path / "lost", "ffffffffffff", database)
    assert "has no run.json" in refused(tmp_path, settings)
    assert "no run directory" in refused(tmp_path / "absent", settings)
    assert "no run directory" in refused(str(tmp_path / "lost" / FILE), settings)
    assert "has no job 'ffffffffffff'" in refused(tmp_path / "lost", settings)
    assert "neither a run directory nor a job" in refused("unknown", settings)


def test_asking_for_a_job_makes_no_database(settings: Settings) -> None:
    assert "does not exist yet" in refused("unknown", settings)
    assert not settings.home.exists()
