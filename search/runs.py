"""The run directory: where a search leaves its pictures and exports, and the small file that leads back to its job.

`DIR/run.json` is written before anything slow happens, so that a search killed at any moment can be found and resumed. The
results themselves are in the database that it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from autoeff.errors import InputError
from autoeff.search.settings import Settings
from autoeff.search.storage.store import Store

__all__ = ["FILE", "FORMAT", "Run", "check_new", "new_run", "open_run", "sqlite_file", "write_file"]

FORMAT = 1
FILE = "run.json"


class Run(NamedTuple):
    """An opened run.

    Attributes:
        store: Open; the caller closes it.
        folder: The run directory; None when the run was named by its job id.
    """

    store: Store
    job_id: str
    folder: Path | None


def check_new(out: Path) -> None:
    """Refuses a run directory that exists: earlier results are never touched.

    Raises:
        InputError: There is something at `out`, even if it is empty.
    """
    if os.path.lexists(out):
        raise InputError(f"{out} exists already; name another --out, or go on with `autoeff resume {out}` if it is a run")


@contextmanager
def new_run(out: Path, job_id: str, database: str) -> Iterator[Path]:
    """Makes the run directory `out` with its `run.json`, which names the job and the URL of its database; yields its absolute path.

    The job is to be stored inside the context: only when that has happened does the directory appear, so that what can be seen can
    be resumed. A relative SQLite path in the URL is made absolute.

    Raises:
        InputError: `out` exists or cannot be made; no half-made one is left behind.
    """
    check_new(out)
    out = out.absolute()
    text = json.dumps({"format": FORMAT, "job": job_id, "database": _absolute(database)}, indent=1) + "\n"
    staged = out.with_name(f".{out.name}.{job_id}")
    try:
        staged.mkdir(parents=True)
        try:
            write_file(staged / FILE, text.encode())
            yield out
            staged.replace(out)
        except BaseException:
            rmtree(staged)
            raise
    except OSError as error:
        raise InputError(f"cannot make the run directory {out}: {error.strerror or error}; name another --out") from None


def open_run(ref: str | Path, settings: Settings) -> Run:
    """The run called `ref`: a run directory, or the id of a job in this machine's database.

    Raises:
        InputError: Neither; or a `run.json` that is damaged or of another format, or whose database or job is gone.
    """
    path = Path(ref)
    if path.is_dir():
        job_id, database = _read(path / FILE)
        folder = path.absolute()
        if (file := sqlite_file(database)) is not None and not file.exists():
            raise InputError(f"{path}: its results are in the database {file}, which does not exist (any more); put it back")
    elif path.exists() or os.sep in str(ref):
        raise InputError(f"{str(ref)!r} is no run directory; name one, or a job id that `autoeff ls` shows")
    else:
        job_id, database, folder = str(ref), settings.database, None
        if (file := sqlite_file(database)) is not None and not file.exists():
            raise InputError(f"{job_id!r} is neither a run directory nor a job: the database {file} does not exist yet")
    store = Store.open(database)
    try:
        store.counts(job_id)
    except InputError:
        store.close()
        what = f"{path}: the database {database} has no job {job_id!r}" if folder else f"{job_id!r} is neither a run directory nor a job"
        raise InputError(f"{what}; `autoeff ls` lists the jobs") from None
    except BaseException:
        store.close()
        raise
    return Run(store, job_id, folder)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a machine that loses power, sees all of it or nothing.

    Raises:
        OSError: It cannot be written; an earlier file is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def _read(path: Path) -> tuple[str, str]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no run directory: it has no {FILE}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged; use the job id instead, which `autoeff ls` shows") from None
    found = value.get("format") if isinstance(value, dict) else None
    if isinstance(value, dict) and found is not None and found != FORMAT:
        raise InputError(f"{path} has format {found!r}; this version reads {FORMAT}: use the autoeff that wrote it or a newer one")
    match value:
        case {"format": 1, "job": str(job), "database": str(database)}:
            return job, database
        case {"format": 1, "job": str(job), "server": str(server)}:
            raise InputError(f"{path.parent} is a run of the server {server}; name it: `autoeff --server {server} …`, or AUTOEFF_SERVER")
    raise InputError(f"{path} is damaged; use the job id instead, which `autoeff ls` shows")


def sqlite_file(url: str) -> Path | None:
    """The file behind a SQLite URL; None for any other, also for one that is none: opening it says what is wrong."""
    try:
        location = make_url(url)
    except ArgumentError:
        return None
    return Path(location.database) if location.get_backend_name() == "sqlite" and location.database else None


def _absolute(url: str) -> str:
    file = sqlite_file(url)
    if file is None:
        return url
    return make_url(url).set(database=str(file.absolute())).render_as_string(hide_password=False)
