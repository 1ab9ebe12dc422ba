"""Does claimed evaluations: the function that the embedded loop and the task queue call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from autoeff.errors import CandidateError, InputError, RunnerLost, StorageError
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.runner_process import Measured
from autoeff.search.storage.records import Claim
from autoeff.search.storage.store import Store

__all__ = ["Runner", "Worker"]

_log = logging.getLogger(__name__)
_AGAIN_S = 1.0  # between tries to write an outcome down


class Runner(Protocol):
    """Measures configurations in a process of its own."""

    def evaluate(self, request: EvaluationRequest, tick: Callable[[], None], /) -> Measured:
        """Measures one configuration; calls `tick` several times a second meanwhile, and is thrown away if that raises.

        Raises:
            CandidateError: It failed, with its class.
            RunnerLost: The process died of something else.
        """

    def log_tail(self) -> str:
        """The end of what was printed meanwhile."""

    def close(self) -> None:
        """Ends the process, if any."""


class _Unwanted(Exception):
    """The claim is void, or nobody wants the result any more."""


class Worker:
    """Evaluates with one warm runner and writes every outcome down.

    Args:
        store: Where claims come from and outcomes go.
        runner: The process that measures.
        lease_s: How long a claim lives without a sign of life; renewed three times in that span.
        one_of_many: Whether the coordinator is another process; then a database that is away is waited for. Alone, it is an error of
            the search.
    """

    def __init__(self, store: Store, runner: Runner, lease_s: float, *, one_of_many: bool = False) -> None:
        self._store, self._runner, self._lease_s, self._one_of_many = store, runner, lease_s, one_of_many

    def work(self, claim: Claim, tick: Callable[[], None] = lambda: None) -> None:
        """Evaluates until the claim has an outcome: a value, the candidate's failure, or a loss that someone may retry.

        Args:
            claim: The right to do so.
            tick: Called several times a second. What it raises ends the evaluation, and the claim is given back.

        Raises:
            InputError: The runner cannot be opened with this setup; the claim is given back.
        """
        renewal = _Renewal(self._store, claim, self._lease_s)

        def both() -> None:
            renewal()
            tick()

        try:
            request = EvaluationRequest(claim.configuration.levels, claim.split, claim.windows)
            measured = self._runner.evaluate(request, both)
        except CandidateError as error:
            failure, message = error.failure, str(error)
            self._written(lambda: self._store.fail(claim, failure, message, self._runner.log_tail()), tick)
        except RunnerLost as error:
            reason = str(error)
            self._written(lambda: self._store.lost(claim, reason, self._runner.log_tail()), tick)
        except _Unwanted:
            self._written(lambda: self._store.release(claim), tick)
        except InputError as error:
            reason = str(error)
            self._written(lambda: self._store.release(claim, reason), tick)
            raise
        except BaseException:
            self._store.release(claim)
            raise
        else:
            self._written(lambda: self._store.complete(claim, measured.measurements, measured.seconds, measured.facts), tick)

    def _written(self, write: Callable[[], object], tick: Callable[[], None]) -> None:
        while True:
            try:
                write()
                return
            except StorageError:
                if not self._one_of_many:
                    raise
            tick()
            time.sleep(_AGAIN_S)


class _Renewal:
    def __init__(self, store: Store, claim: Claim, lease_s: float) -> None:
        self._store, self._claim, self._lease_s = store, claim, lease_s
        self._next = time.monotonic() + lease_s / 3

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        try:
            if not self._store.renew(self._claim, self._lease_s):
                raise _Unwanted
        except StorageError as error:  # the lease may end, and the result is written down all the same if nobody took over
            _log.warning("evaluation %d: its lease is not renewed: %s", self._claim.evaluation_id, error)
        self._next = time.monotonic() + self._lease_s / 3
