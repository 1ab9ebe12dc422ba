"""Does claimed evaluations: the function that the embedded loop calls, and a task queue would."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from autoeff.errors import CandidateError, InputError, RunnerLost
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.runner_process import Measured
from autoeff.search.storage.records import Claim
from autoeff.search.storage.store import Store

__all__ = ["Runner", "Worker"]


class Runner(Protocol):
    """Measures configurations in a process of its own."""

    def evaluate(self, request: EvaluationRequest, tick: Callable[[], None], /) -> Measured:
        """Measures one configuration; calls `tick` several times a second meanwhile.

        Raises:
            CandidateError: It failed, with its class.
            RunnerLost: The process died of something else.
        """

    def log_tail(self) -> str:
        """The end of what was printed meanwhile."""

    def close(self) -> None:
        """Ends the process, if any."""


class Worker:
    """Evaluates with one warm runner and writes every outcome down.

    Args:
        store: Where claims come from and outcomes go.
        runner: The process that measures.
        lease_s: How long a claim lives without a sign of life; renewed three times in that span.
    """

    def __init__(self, store: Store, runner: Runner, lease_s: float) -> None:
        self._store, self._runner, self._lease_s = store, runner, lease_s

    def work(self, claim: Claim) -> None:
        """Evaluates until the claim has an outcome: a value, the candidate's failure, or a loss that someone may retry.

        Raises:
            InputError: The runner cannot be opened with this setup; the claim is given back.
        """
        try:
            request = EvaluationRequest(claim.configuration.levels, claim.split, claim.windows)
            measured = self._runner.evaluate(request, _Renewal(self._store, claim, self._lease_s))
        except CandidateError as error:
            self._store.fail(claim, error.failure, str(error), self._runner.log_tail())
        except RunnerLost as error:
            self._store.lost(claim, str(error), self._runner.log_tail())
        except (InputError, KeyboardInterrupt):
            self._store.release(claim)
            raise
        else:
            self._store.complete(claim, measured.measurements, measured.seconds)


class _Renewal:
    def __init__(self, store: Store, claim: Claim, lease_s: float) -> None:
        self._store, self._claim, self._lease_s = store, claim, lease_s
        self._next = time.monotonic() + lease_s / 3

    def __call__(self) -> None:
        if time.monotonic() >= self._next:
            self._store.renew(self._claim, self._lease_s)
            self._next = time.monotonic() + self._lease_s / 3
