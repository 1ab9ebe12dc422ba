"""Fronts of jobs, kept up with their events: reading every trial of a job takes longer than a request should."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from autoeff.search.standing import Standing, Tally, standing_of
from autoeff.search.storage.records import Job
from autoeff.search.storage.store import Store

__all__ = ["Standings"]

_KEPT = 256
_PAGE = 500
_FOLLOWED = 10_000
"""Events that are read one by one; a job that is further ahead is read anew."""


@dataclass
class _Kept:
    """A tally that has seen the trials that ended up to an event."""

    tally: Tally | None = None
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Standings:
    """Where jobs stand.

    Args:
        store: Holds them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
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
            if (tally := kept.tally) is None or job.events - kept.seen > _FOLLOWED:
                tally = kept.tally or Tally(self._store, job)
                tally.read_all(job.counts.trials)
                kept.tally, kept.seen = tally, job.events  # counted in the same row, so what ended later has a later event
            while kept.seen < job.events and (page := self._store.events(job.id, kept.seen, _PAGE)):
                tally.read([event.body["trial"] for event in page if event.kind == "trial.succeeded"])
                kept.seen = page[-1].seq
            return tally.standing
