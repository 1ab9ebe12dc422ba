"""What a job leaves for download: its report, and trials written out as archives.

An archive is named by its trial and format, and is made once: its description is written last, so that what has one is whole. Asking
again for what is there, or under way, starts nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autoeff.api.backroom import Backroom
from autoeff.errors import AutoeffError, NotFound
from autoeff.search.runs import write_file
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Job

__all__ = ["REPORT", "Exports", "export_archive", "write_job_report"]

REPORT = {"report.html": "text/html", "front.png": "image/png"}
"""The files of a report, drawn from the tables when they are first asked for."""
_ARCHIVE = re.compile(r"trial-(\d{1,9})\.([a-z0-9-]{1,40})\.tar")
_EXPORTS, _PARTIAL = "exports", ".export-"
_CHUNK = 1 << 20


class Exports:
    """The files of jobs.

    Args:
        settings: Of this machine.
        drawing: Where reports are drawn.
        exporting: Where exports are made; what they take, in time and memory, keeps nobody else waiting.
    """

    def __init__(self, settings: Settings, drawing: Backroom, exporting: Backroom) -> None:
        self._settings, self._drawing, self._exporting = settings, drawing, exporting
        self._begun: dict[Path, Future[None]] = {}
        self._lock = threading.Lock()

    def request(self, job_id: str, number: int, format_name: str) -> dict[str, Any]:
        """The archive of a trial: as it is, or begun now. One that failed is begun again."""
        name = f"trial-{number}.{format_name}.tar"
        path = self._folder(job_id) / _EXPORTS / name
        with self._lock:
            if self._running(path) or _described(path).get("sha256"):
                return self._archive(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            _description(path).unlink(missing_ok=True)
            self._begun[path] = self._exporting.start(export_archive, job_id, number, str(path), format_name, self._settings)
        return self._archive(path)

    def all(self, job: Job) -> list[dict[str, Any]]:
        """Every file of a job: of a report, where it has ended, and of exports."""
        folder = self._folder(job.id)
        found = [{"name": name, "state": "ready", "media_type": kind} for name, kind in REPORT.items() if job.result is not None]
        with self._lock:
            begun = {path for path in self._begun if path.parent.parent == folder}
        stored = {path.with_suffix("") for path in (folder / _EXPORTS).glob("*.tar.json")}
        return [*found, *(self._archive(path) for path in sorted(begun | stored))]

    def archive(self, job_id: str, name: str) -> tuple[dict[str, Any], Path]:
        """The archive of this name, and where it stands; nothing but such names is ever looked for.

        Raises:
            NotFound: There is none.
        """
        if _ARCHIVE.fullmatch(name):
            path = self._folder(job_id) / _EXPORTS / name
            if path in self._begun or _description(path).is_file():
                return self._archive(path), path
        raise NotFound("this job has no file of that name (yet)")

    async def report(self, job: Job, name: str) -> Path:
        """A file of the report of a job that has ended.

        Raises:
            NotFound: It has not.
        """
        if job.result is None:
            raise NotFound(f"job {job.id} is {job.state} and has no report (yet)")
        folder = self._folder(job.id) / f"report-{job.version}"
        if not (folder / name).is_file():
            await self._drawing.ask(f"report {folder}", write_job_report, job.id, str(folder), self._settings)
        return folder / name

    def sweep(self) -> None:
        """Removes what exports left whose process was killed, and nothing of those that are under way, whichever server began them."""
        for folder in self._folder("").glob(f"*/{_EXPORTS}"):
            with suppress(OSError), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                for left in folder.glob(f"{_PARTIAL}*"):
                    shutil.rmtree(left, ignore_errors=True)

    def _folder(self, job_id: str) -> Path:
        return self._settings.job_folder(job_id)

    def _running(self, path: Path) -> bool:
        future = self._begun.get(path)
        return future is not None and not future.done()

    def _archive(self, path: Path) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": path.name, "media_type": "application/x-tar"}
        if self._running(path):
            return facts | {"state": "building"}
        described = _described(path)
        if described:
            return facts | described
        future = self._begun.get(path)
        died = "the process that wrote it died; ask for it again"
        if future is None:
            return facts | {"state": "failed", "failure": died}
        try:
            error = future.exception(timeout=0)
        except (CancelledError, TimeoutError):
            error = None
        return facts | {"state": "failed", "failure": str(error) if isinstance(error, AutoeffError) else died}


def export_archive(job_id: str, number: int, path: str, format_name: str, settings: Settings) -> None:
    """Exports a trial, as `autoeff export` does, into a tar file at `path`, and describes it beside.

    Raises:
        AutoeffError: As `run.export`; the description then says why.
    """
    from autoeff.search.run import export  # the engine: this runs in a process of its own

    archive = Path(path)
    with _locked(archive.parent, fcntl.LOCK_SH), tempfile.TemporaryDirectory(dir=archive.parent, prefix=_PARTIAL) as place:
        folder = Path(place) / "model"
        try:
            facts = export(job_id, number, folder, format_name, settings)
        except AutoeffError as error:
            _describe(archive, {"state": "failed", "failure": " ".join(str(error).split())})
            raise
        partial = Path(place) / "archive"
        with tarfile.open(partial, "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, f"{archive.name.removesuffix('.tar')}/{file.name}", filter=_plain)
        shutil.rmtree(folder)
        digest, size = hashlib.sha256(), 0
        for chunk in _chunks(partial):
            digest.update(chunk)
            size += len(chunk)
        partial.replace(archive)
    kept = {key: facts[key] for key in ("format", "files", "linear_bytes", "quality", "trial", "measured")}
    _describe(archive, {"state": "ready", "bytes": size, "sha256": digest.hexdigest(), "facts": kept})


def write_job_report(job_id: str, folder: str, settings: Settings) -> None:
    """Draws the report of a finished job into `folder`, as a search without a server does."""
    from autoeff.search.report import write_report  # matplotlib
    from autoeff.search.results import rows_of
    from autoeff.search.storage.store import Store

    with Store.open(settings.database) as store:
        job = store.job(job_id)
        assert job.result is not None
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_report(Path(folder), job, rows_of(store, job_id), job.result)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Holds a lock of `flock` on a folder; the kernel lets go of it when this process ends, however that happens."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names, times and owners of this machine: equal exports are equal archives."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    member.mode = 0o644
    return member


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _description(archive: Path) -> Path:
    return archive.with_name(archive.name + ".json")


def _describe(archive: Path, facts: dict[str, Any]) -> None:
    write_file(_description(archive), json.dumps(facts).encode())


def _described(archive: Path) -> dict[str, Any]:
    try:
        value = json.loads(_description(archive).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
