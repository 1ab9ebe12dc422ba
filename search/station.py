"""A worker process: claims queued evaluations of any job, one at a time, and keeps one runner warm for the job that it is at.

Opening a model takes long. So a worker stays at a job that has work for it for ten times as long as opening took; only then what waits
longest comes first. Changing between jobs costs it a tenth of its time at most, and no job waits for the end of another. For the next
proposal of its job, which a coordinator makes when it has heard of the last outcome, it waits no longer than opening another takes.

The embedded loop below and the Celery task (`celery_app`) call the same `Station.evaluate`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from autoeff.errors import InputError, StorageError
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup
from autoeff.search.hardware import hardware
from autoeff.search.job import JobSpec
from autoeff.search.runner_process import Measured, RunnerProcess, prestart
from autoeff.search.settings import Settings
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import Claim, Job
from autoeff.search.storage.store import Store
from autoeff.search.worker import Worker

__all__ = ["QUEUE", "Station", "check_queues"]

QUEUE = "cpu"
"""Where a worker listens that is not told otherwise."""
_log = logging.getLogger(__name__)
_GRACE_S = 20.0  # for what is being evaluated when the process is asked to end
_QUICKEST_S = 0.02  # between looks for work, after there was some
_LOOKED_AT = 16  # queued evaluations that a worker tries to claim
_STAY = 10.0  # times as long as opening took
_PATIENCE_S = 5.0  # at most, for a job's next proposal
_REFUSED_S = 60.0  # until a job that cannot be begun here is tried again


def check_queues(queues: Sequence[str]) -> None:
    """Refuses queues that no worker, or not this machine's, can serve.

    Raises:
        InputError: With what is allowed here.
    """
    kind = hardware().kind
    allowed = ["cpu"] if kind == "cpu" else ["cpu", "gpu.any", f"gpu.{kind}"]
    wrong = [queue for queue in queues if queue not in allowed]
    if wrong or not queues:
        raise InputError(f"queues {', '.join(wrong) or 'are missing'}: this machine can serve {', '.join(allowed)}")


class Station:
    """Evaluates for the jobs in a database.

    Args:
        settings: Of this machine.
        queues: Whose evaluations it takes.
        leaving: Whether the process was asked to end, where it is not told by `stop`.
    """

    def __init__(self, settings: Settings, queues: Sequence[str], leaving: Callable[[], bool] = lambda: False) -> None:
        self.me = process_identity()
        self._settings, self._queues, self._leaving = settings, tuple(queues), leaving
        self._log = settings.home / "workers" / f"{self.me.replace('/', '-')}.log"
        self._store: Store | None = None
        self._opening = threading.Lock()
        self._setup: EvaluationSetup | None = None
        self._job: str | None = None
        self._refused: dict[str, float] = {}  # jobs, and until when
        self._ended_at = float("-inf")
        self._runner: RunnerProcess | None = None
        self._stop = threading.Event()
        self._stop_at = float("inf")

    def open(self) -> None:
        """Announces the worker, and goes on to say that it lives until `close`."""
        if QUEUE in self._queues:
            prestart("cpu")
        threading.Thread(target=self._live, name="sign of life", daemon=True).start()

    def close(self) -> None:
        """Ends the runner and takes the worker off the list; what it still held is for others."""
        self.stop(0.0)
        if self._runner is not None:
            self._runner.close()
        if self._store is not None:
            try:
                self._store.worker_seen(self.me, 0.0)
            except StorageError as error:
                _log.warning("%s", error)
            self._store.close()

    def stop(self, grace_s: float = _GRACE_S) -> None:
        """Nothing more is claimed; what is being evaluated is given back after `grace_s` seconds."""
        self._stop_at = min(self._stop_at, time.monotonic() + grace_s)
        self._stop.set()

    def run(self) -> None:
        """Evaluates what is queued, until `stop`: the loop of a worker without a broker."""
        pause = _QUICKEST_S
        while not self._stop.is_set():
            found = self.evaluate()
            pause = _QUICKEST_S if found else min(2 * pause, self._settings.poll_s)
            if not found:
                self._stop.wait(pause)

    def evaluate(self, *told_of: int) -> bool:
        """Does a piece of queued work and writes its outcome down; False when there is none, or it cannot be begun now.

        Args:
            told_of: Of which a message has told.
        """
        if self._stop.is_set():
            return False
        try:
            store = self._opened()
            claims = (store.claim(evaluation_id, self.me, self._settings.lease_s) for evaluation_id in self._queued(store, told_of))
            claim = next((claim for claim in claims if claim is not None), None)
            if claim is None:
                return False
            job = store.job_of_evaluation(claim.evaluation_id)
        except StorageError as error:  # its message comes again
            _log.warning("%s", error)
            return False
        try:
            self._work(store, claim, job)
        except InputError as error:  # on another machine it may be none
            _log.warning("job %s: %s", job.id, error)
            self._refused[job.id] = time.monotonic() + _REFUSED_S
            self._job = None
            self._let_go()
        self._ended_at = time.monotonic()
        return True

    def _work(self, store: Store, claim: Claim, job: Job) -> None:
        """Evaluates what was claimed. Raises InputError where this job cannot be begun here, once the claim is given back."""
        try:
            setup = replace(JobSpec.parse(job.spec).setup(self._settings.bank), hardware=job.queue)
        except InputError as error:
            store.release(claim, f"worker {self.me} cannot read the job: {error}")
            raise
        if self._runner is None or setup != self._setup:
            self._let_go()
            self._setup, self._runner = setup, RunnerProcess(setup, self._settings, self._log)
        self._job = job.id
        runner = _Same(self._runner, job.setup_digest, self.me)
        try:
            Worker(store, runner, self._settings.lease_s, one_of_many=True).work(claim, self._tick)
        except _Leaving:
            self._runner.close()

    def _let_go(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _queued(self, store: Store, told_of: Sequence[int]) -> Iterator[int]:
        """What may be claimed, in the order in which it is tried."""
        self._refused = {job_id: until for job_id, until in self._refused.items() if time.monotonic() < until}
        others = [*(told_of if not self._refused else ()), *store.waiting(self._queues, _LOOKED_AT, but=self._refused)]
        if others and self._runner is not None:
            until = self._runner.opened_at + _STAY * self._runner.opening_s
            patient_until = min(until, self._ended_at + min(self._runner.opening_s, _PATIENCE_S))
            while not (mine := store.waiting(self._queues, _LOOKED_AT, self._job)) and time.monotonic() < patient_until:
                if self._stop.wait(_QUICKEST_S):
                    return
            if time.monotonic() < until:
                yield from sorted(mine, key=lambda evaluation_id: evaluation_id not in told_of)
        yield from others

    def _tick(self) -> None:
        if self._leaving():
            self.stop(_GRACE_S)
        if time.monotonic() > self._stop_at:
            raise _Leaving

    def _opened(self) -> Store:
        with self._opening:
            self._store = self._store or Store.open(self._settings.database)
            return self._store

    def _live(self) -> None:
        lease_s, here = self._settings.lease_s, hardware()
        announced = False
        while not self._stop.is_set():
            try:
                if announced:
                    self._opened().worker_seen(self.me, lease_s)
                else:
                    self._opened().announce_worker(self.me, self._queues, here.kind, here.facts, lease_s)
                    announced = True
            except StorageError as error:
                _log.warning("%s", error)
            self._stop.wait(lease_s / 3)


class _Leaving(BaseException):
    """The process is to end, and its grace is over."""


@dataclass(frozen=True)
class _Same:
    """A runner whose model, text and software must be what the job was planned with."""

    runner: RunnerProcess
    digest: str
    worker: str

    def evaluate(self, request: EvaluationRequest, tick: Callable[[], None], /) -> Measured:
        self.runner.open(tick)
        if self.runner.digest != self.digest:
            raise InputError(
                f"worker {self.worker} has another model, text or version than the job was submitted with: {self.runner.digest} "
                f"instead of {self.digest}"
            )
        return self.runner.evaluate(request, tick)

    def log_tail(self) -> str:
        return self.runner.log_tail()

    def close(self) -> None:
        self.runner.close()
