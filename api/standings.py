"""Fronts of jobs, kept until the next event of the job: reading every trial of a job takes longer than a request should."""

from __future__ import annotations

import threading
from collections import OrderedDict

from autoeff.search.standing import Standing, standing_of
from autoeff.search.storage.records import Job
from autoeff.search.storage.store import Store

__all__ = ["Standings"]

_KEPT = 256


class Standings:
    """Where jobs stand.

    Args:
        store: Holds them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, tuple[int, Standing]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, job: Job) -> Standing:
        """The standing of a job as of its last event."""
        with self._lock:
            found = self._known.get(job.id)
        if found is not None and found[0] == job.events:
            return found[1]
        standing = standing_of(self._store, job)
        with self._lock:
            self._known[job.id] = (job.events, standing)
            self._known.move_to_end(job.id)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return standing
