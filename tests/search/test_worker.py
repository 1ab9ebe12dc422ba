"""What a worker writes down beside the values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.facts import attempt_facts
from autoeff.search.runner_process import Measured
from autoeff.search.storage import Proposal, Store, process_identity
from autoeff.search.worker import Worker
from autoeff.spaces.configuration import Configuration
from autoeff.spaces.measurements import Measurement

USE = {"packed_linears": 24, "packed_calls": 192, "decoded_linears": 0}


class OnKernels:
    """Answers as a runner on a GPU does."""

    def evaluate(self, request: EvaluationRequest, tick: Callable[[], None], /) -> Measured:
        return Measured((Measurement("kl", 0.25, request.split, request.windows),), 0.5, USE)

    def log_tail(self) -> str:
        return ""

    def close(self) -> None:
        pass


def test_how_a_candidate_was_computed_stands_in_its_attempt(tmp_path: Path) -> None:
    me = process_identity()
    with Store.open(f"sqlite:///{tmp_path / 'autoeff.db'}") as store:
        store.create_job("job", {"model": "demo"}, {"dense": 1}, {"decisions": []}, "0" * 64)
        fence = store.acquire_coordinator("job", me, 60)
        proposal = Proposal(0, Configuration({"a:bits": 4}), "searched", "search", 16, 1.0, "1" * 64, {"avg_bits": 4.5}, feasible=True)
        trial = store.propose("job", fence, proposal)
        claim = store.claim(trial.evaluation_id, me, 60)
        assert claim is not None
        Worker(store, OnKernels(), 60).work(claim)
        (attempt,) = attempt_facts(store.attempts(trial.evaluation_id))
    assert attempt["facts"] == USE
    assert attempt["outcome"] == "succeeded"
