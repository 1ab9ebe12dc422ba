"""Fronts of jobs, kept up with their events: reading every trial of a job takes longer than a request should.

Of a large job it is kept in a file, too, so that a server which starts again goes on from there. The file follows from what is decided
in the tables, which never changes, and may be removed at any time.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autoeff.search.runs import write_file
from autoeff.search.standing import Standing, Tally, standing_of
from autoeff.search.storage.records import Job
from autoeff.search.storage.store import Store

__all__ = ["Standings"]

_KEPT = 256
_PAGE = 500
_FORMAT = 1
_FILE = "standing.json"
_log = logging.getLogger(__name__)


@dataclass
class _Kept:
    """A tally that has seen the trials that ended up to an event, and the event up to which it stands in a file."""

    tally: Tally | None = None
    seen: int = 0
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Standings:
    """Where jobs stand.

    Args:
        store: Holds them.
        folder_of: Where a job's files are, by its id.
        written_after: A file is written when so many events have happened since the last one.
    """

    def __init__(self, store: Store, folder_of: Callable[[str], Path], written_after: int = 10_000) -> None:
        self._store, self._folder_of, self._written_after = store, folder_of, written_after
        self._known: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, job: Job) -> Standing:
        """The standing of a job as of its last event, or of a later one."""
        if job.result is not None:
            return standing_of(self._store, job)
        with self._lock:
            kept = self._known.setdefault(job.id, _Kept())
            self._known.move_to_end(job.id)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        with kept.lock:
            tally = kept.tally or self._begun(kept, job)
            while kept.seen < job.events and (page := self._store.events(job.id, kept.seen, _PAGE)):
                tally.read([event.body["trial"] for event in page if event.kind == "trial.succeeded"])
                kept.seen = page[-1].seq
            if kept.seen - kept.written >= self._written_after:
                self._write(kept, tally, job)
            return tally.standing

    def _begun(self, kept: _Kept, job: Job) -> Tally:
        """A tally that goes on from the file of the job, or else has read all of its trials."""
        tally, path = Tally(self._store, job), self._folder_of(job.id) / _FILE
        try:
            value = json.loads(path.read_bytes()) if path.exists() else None
            if value is not None and value["format"] == _FORMAT and value["seen"] <= job.events:
                tally.restore(value["tally"])
                kept.written = kept.seen = value["seen"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.warning("the standing of job %s is read anew: %s", job.id, error)
            tally = Tally(self._store, job)
        if not kept.seen:
            tally.read_all(job.counts.trials)
            kept.seen = job.events  # counted in the same row, so what ended later has a later event
        kept.tally = tally
        return tally

    def _write(self, kept: _Kept, tally: Tally, job: Job) -> None:
        path = self._folder_of(job.id) / _FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps({"format": _FORMAT, "seen": kept.seen, "tally": tally.to_json()}).encode())
        except OSError as error:
            _log.warning("the standing of job %s is not kept: %s", job.id, error)
        kept.written = kept.seen
