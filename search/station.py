"""A worker process: claims queued evaluations of any job, one at a time, and keeps one runner warm for the job it is at.

The embedded loop below and the Celery task (`celery_app`) call the same `Station.evaluate`.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from autoeff.errors import InputError, StorageError
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup
from autoeff.search.job import JobSpec
from autoeff.search.runner_process import Measured, RunnerProcess
from autoeff.search.settings import Settings
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.store import Store
from autoeff.search.worker import Worker

__all__ = ["QUEUE", "Station", "check_queues", "hardware_kind"]

QUEUE = "cpu"
"""Where a worker listens that is not told otherwise."""
_log = logging.getLogger(__name__)
_GRACE_S = 20.0  # for what is being evaluated when the process is asked to end
_QUICKEST_S = 0.02  # between looks for work, after there was some
_LOOKED_AT = 16  # queued evaluations that a worker without a broker tries to claim


def hardware_kind() -> str:
    """The kind of this machine's device, as in the queue `gpu.KIND`: such as `h200`, or `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name(0).lower().split()
    return "-".join(word for word in words if word not in ("nvidia", "amd", "geforce", "tesla"))


def check_queues(queues: Sequence[str]) -> None:
    """Refuses queues that no worker, or not this machine's, can serve.

    Raises:
        InputError: With what is allowed here.
    """
    kind = hardware_kind()
    allowed = ["cpu"] if kind == "cpu" else ["cpu", "gpu.any", f"gpu.{kind}"]
    wrong = [queue for queue in queues if queue not in allowed]
    if wrong or not queues:
        raise InputError(f"queues {', '.join(wrong) or 'are missing'}: this machine can serve {', '.join(allowed)}")


class Station:
    """Evaluates for the jobs in a database.

    Args:
        settings: Of this machine.
        queues: Whose evaluations it takes.
    """

    def __init__(self, settings: Settings, queues: Sequence[str]) -> None:
        self.me = process_identity()
        self._settings, self._queues = settings, tuple(queues)
        self._log = settings.home / "workers" / f"{self.me.split('/')[2]}.log"
        self._store: Store | None = None
        self._opening = threading.Lock()
        self._setup: EvaluationSetup | None = None
        self._runner: RunnerProcess | None = None
        self._stop = threading.Event()
        self._stop_at = float("inf")

    def open(self) -> None:
        """Announces the worker, and goes on to say that it lives until `close`."""
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
            try:
                queued = self._opened().waiting(self._queues, _LOOKED_AT)
            except StorageError as error:
                _log.warning("%s", error)
                queued = []
            found = any(self.evaluate(evaluation_id) for evaluation_id in queued if not self._stop.is_set())
            pause = _QUICKEST_S if found else min(2 * pause, self._settings.poll_s)
            if not found:
                self._stop.wait(pause)

    def evaluate(self, evaluation_id: int) -> bool:
        """Does this work and writes its outcome down; False when it is not there to be done any more, or cannot be begun now."""
        if self._stop.is_set():
            return False
        try:
            store = self._opened()
            claim = store.claim(evaluation_id, self.me, self._settings.lease_s)
            if claim is None:
                return False
            job = store.job_of_evaluation(evaluation_id)
        except StorageError as error:  # its message comes again
            _log.warning("%s", error)
            return False
        try:
            setup = replace(JobSpec.parse(job.spec).setup(self._settings.bank), hardware=job.queue)
        except InputError as error:
            store.lost(claim, f"worker {self.me} cannot read the job: {error}")
            return True
        if self._runner is None or setup != self._setup:
            if self._runner is not None:
                self._runner.close()
            self._setup, self._runner = setup, RunnerProcess(setup, self._settings, self._log)
        runner = _Same(self._runner, job.setup_digest, self.me)
        try:
            Worker(store, runner, self._settings.lease_s, one_of_many=True).work(claim, self._tick)
        except _Leaving:
            self._runner.close()
        return True

    def _tick(self) -> None:
        if time.monotonic() > self._stop_at:
            raise _Leaving

    def _opened(self) -> Store:
        with self._opening:
            self._store = self._store or Store.open(self._settings.database)
            return self._store

    def _live(self) -> None:
        lease_s, kind = self._settings.lease_s, hardware_kind()
        facts: dict[str, Any] = {
            "name": torch.cuda.get_device_name(0) if kind != "cpu" else platform.processor() or platform.machine(),
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory if kind != "cpu" else psutil.virtual_memory().total,
            "cores": psutil.cpu_count(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }
        announced = False
        while not self._stop.is_set():
            try:
                if announced:
                    self._opened().worker_seen(self.me, lease_s)
                else:
                    self._opened().announce_worker(self.me, self._queues, kind, facts, lease_s)
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
