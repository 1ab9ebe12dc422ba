"""What a worker claims next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from autoeff.evaluators.setup import EvaluationSetup
from autoeff.search import station as module
from autoeff.search.job import JobSpec
from autoeff.search.runner_process import Measured
from autoeff.search.settings import Settings
from autoeff.search.station import Station
from autoeff.search.storage import Proposal, State, Store
from autoeff.spaces.configuration import Configuration
from autoeff.spaces.measurements import Measurement


class Slow:
    """A runner whose opening takes a hundred times as long as an evaluation does."""

    digest = "setup"
    opened_at, opening_s = float("-inf"), 0.4

    def __init__(self, setup: EvaluationSetup, *_: Any) -> None:
        self.opened = False

    def open(self, tick: Callable[[], None]) -> None:
        if not self.opened:
            time.sleep(self.opening_s)
            self.opened, self.opened_at = True, time.monotonic()

    def evaluate(self, *_: Any) -> Measured:
        time.sleep(0.004)
        return Measured((Measurement("kl", 0.5, "search", 16),), 0.004)

    def log_tail(self) -> str:
        return ""

    def close(self) -> None:
        self.opened = False


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(Settings(home=tmp_path).database) as opened:
        yield opened


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Station]:
    monkeypatch.setattr(module, "RunnerProcess", Slow)
    made = Station(Settings(home=tmp_path), ["cpu"])
    yield made
    made.close()


@pytest.fixture
def propose(store: Store, tiny_job: Callable[..., JobSpec]) -> Callable[[str, int], int]:
    """`propose(job, number)`: a trial of a job that is made when it is first named; the id of its evaluation."""
    fences: dict[str, int] = {}

    def add(job: str, number: int) -> int:
        if job not in fences:
            store.create_job(job, tiny_job(seed=len(fences)).model_dump(mode="json"), {}, {}, Slow.digest, queue="cpu")
            fences[job] = store.acquire_coordinator(job, "test", 600.0)
        configuration = Configuration({f"{job}:bits": number})
        proposal = Proposal(number, configuration, "random", "search", 4, 1.0, f"{job} {number}", {}, True)
        return store.propose(job, fences[job], proposal).evaluation_id

    return add


def changes(store: Store, *jobs: str) -> int:
    """How often a worker went from one of these jobs to another."""
    attempts = [(a.started_at, job) for job in jobs for trial in store.trials(job) for a in store.attempts(trial.evaluation_id)]
    return sum(before != after for before, after in pairwise(job for _, job in sorted(attempts)))


def test_a_worker_stays_at_a_job_for_ten_times_as_long_as_opening_took_and_then_serves_what_waits_longest(
    store: Store, station: Station, propose: Callable[[str, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        propose("a", number)
        propose("b", number)
    assert [station.evaluate() for _ in range(25)] == [True] * 24 + [False]
    assert changes(store, "a", "b") == 1
    monkeypatch.setattr(module, "_STAY", 0.0)
    for number in range(12, 15):
        propose("a", number)
        propose("b", number)
    while station.evaluate():
        pass
    assert changes(store, "a", "b") >= 1 + 5


def test_a_worker_waits_for_the_next_proposal_of_its_job_but_no_longer_than_opening_another_takes(
    store: Store, station: Station, propose: Callable[[str, int], int]
) -> None:
    propose("a", 0)
    assert station.evaluate()
    other = propose("b", 0)
    coordinator = threading.Timer(0.1, propose, ("a", 1))
    coordinator.start()
    assert station.evaluate(other)
    coordinator.join()
    assert [trial.state.terminal for job in ("a", "b") for trial in store.trials(job)] == [True, True, False]
    begun = time.monotonic()
    assert station.evaluate(10**6)  # of a message that nobody should have sent
    assert time.monotonic() - begun < 10 * Slow.opening_s
    assert store.trials("b")[0].state.terminal
    assert changes(store, "a", "b") == 1
    assert not station.evaluate(other)


def test_a_worker_that_is_to_end_gives_back_what_it_is_at(
    store: Store, tmp_path: Path, propose: Callable[[str, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Slow):
        def evaluate(self, request: Any, tick: Callable[[], None]) -> Measured:
            while True:
                asked.append(True)
                tick()
                time.sleep(0.01)

    asked: list[bool] = []
    monkeypatch.setattr(module, "RunnerProcess", Endless)
    monkeypatch.setattr(module, "_GRACE_S", 0.2)
    station = Station(Settings(home=tmp_path), ["cpu"], lambda: len(asked) > 3)
    evaluation = propose("a", 0)
    assert station.evaluate()
    assert len(asked) > 3
    station.close()
    assert [attempt.outcome for attempt in store.attempts(evaluation)] == ["released"]
    assert store.trials("a")[0].state is State.QUEUED
    assert not station.evaluate()
