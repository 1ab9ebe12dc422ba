"""Who evaluates for a coordinator: one runner in this process, or workers anywhere that claim from the database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from autoeff.errors import AutoeffError
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import Claim, Trial
from autoeff.search.storage.store import Store
from autoeff.search.worker import Runner, Worker

__all__ = ["Away", "Crew", "Here", "Stopped"]

_QUICKEST_S, _SLOWEST_S, _SHARE = 0.01, 0.5, 0.05
"""Between looks for results: this share of the time that was waited already, within these bounds."""
_WIDTH_KEPT_S = 1.0
_AHEAD = 16
"""For so many workers one evaluation more is in flight, so that they need not wait for the coordinator; a few workers see every outcome."""


class Stopped(AutoeffError):
    """The job is not to go on now."""


class Crew(Protocol):
    """Has trials evaluated."""

    @property
    def runner(self) -> Runner | None:
        """For what else is asked of the model at the end; None where there is none at hand."""

    @property
    def claims(self) -> str | None:
        """Who claims what is proposed, in the same transaction; None where workers come for it."""

    def width(self) -> int:
        """How many evaluations may be in flight, at least 1."""

    def begin(self, trial: Trial, claim: Claim | None) -> None:
        """Hears of an open trial, and of the claim on it where it was made already."""

    def ended(self, job_id: str, trials: Mapping[int, Trial], look: Callable[[], None]) -> list[Trial]:
        """Waits until some of these open trials have an outcome and returns those; calls `look` several times a second meanwhile."""

    def close(self) -> None:
        """Nothing more will be asked."""


class Here:
    """One runner, driven by this process.

    Args:
        store: Where outcomes go.
        runner: Measures.
        lease_s: Of claims.
    """

    def __init__(self, store: Store, runner: Runner, lease_s: float) -> None:
        self.runner = runner
        self.claims = process_identity()
        self._store, self._lease_s = store, lease_s
        self._worker = Worker(store, runner, lease_s)
        self._claimed: dict[int, Claim] = {}

    def width(self) -> int:
        return 1

    def begin(self, trial: Trial, claim: Claim | None) -> None:
        if claim is not None:
            self._claimed[trial.number] = claim

    def ended(self, job_id: str, trials: Mapping[int, Trial], look: Callable[[], None]) -> list[Trial]:
        trial = trials[min(trials)]
        while not trial.state.terminal:  # a lost runner is replaced until the store gives the candidate up
            claim = self._claimed.pop(trial.number, None) or self._store.claim(trial.evaluation_id, self.claims, self._lease_s)
            if claim is None:  # equal work of another job is under way in another process
                time.sleep(0.2)
                self._store.reap()
            else:
                self._worker.work(claim, look)
            look()
            trial = self._store.trial(job_id, trial.number)
        return [trial]

    def close(self) -> None:
        self.runner.close()


class Away:
    """Workers in other processes; as many evaluations are in flight as there are workers, of many workers a few more.

    Args:
        store: Where outcomes are found.
        queue: Whose workers.
        rung: Set when something was proposed, so that messages are sent at once.
        stop: Set when this process is to end.
    """

    runner = None
    claims = None

    def __init__(self, store: Store, queue: str, rung: threading.Event, stop: threading.Event) -> None:
        self._store, self._queue, self._rung, self._stop = store, queue, rung, stop
        self._width, self._counted = 1, float("-inf")

    def width(self) -> int:
        if time.monotonic() - self._counted > _WIDTH_KEPT_S:
            workers = sum(worker.alive and self._queue in worker.queues for worker in self._store.workers())
            self._width = max(1, workers + workers // _AHEAD)
            self._counted = time.monotonic()
        return self._width

    def begin(self, trial: Trial, claim: Claim | None) -> None:
        self._rung.set()

    def ended(self, job_id: str, trials: Mapping[int, Trial], look: Callable[[], None]) -> list[Trial]:
        started = time.monotonic()
        while not (ended := [trial for trial in self._store.untold(job_id) if trial.number in trials]):
            look()
            wait = _SHARE * (time.monotonic() - started)
            if self._stop.wait(min(max(wait, _QUICKEST_S), _SLOWEST_S)):
                raise Stopped("this process is to end")
        return ended

    def close(self) -> None:
        return
