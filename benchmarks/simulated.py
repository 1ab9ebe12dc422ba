"""What a load needs besides the service: workers that compute nothing, and jobs with a history that nobody searched.

python benchmarks/simulated.py worker [--seconds 0.0]      # `autoeff worker` whose evaluations sleep instead
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import typer
from sqlalchemy import insert, update

from autoeff.errors import StorageError
from autoeff.evaluators.preparation import prepare
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup
from autoeff.search import station
from autoeff.search.results import evaluation_key
from autoeff.search.runner_process import Measured
from autoeff.search.samplers.problem import Problem
from autoeff.search.storage import Claim, Job, JobState, State, Store
from autoeff.search.storage.rows import values_of
from autoeff.search.storage.tables import ConfigurationRow, EvaluationRow, JobRow, MeasurementRow, TrialRow, now
from autoeff.spaces.configuration import Configuration, Level, digest_of
from autoeff.spaces.measurements import Measurement, Split

_CHUNK = 10_000


def values(levels: Mapping[str, Level], split: Split, windows: int) -> tuple[Measurement, ...]:
    """What a simulated evaluation gives: a pure function of the configuration, and the better the more bits there are."""
    drawn = random.Random(digest_of(dict(levels)))
    bits = [level for level in levels.values() if isinstance(level, int | float)]
    quality = (0.5 + drawn.random()) * sum(2.0**-level for level in bits) / max(1, len(bits))
    tokens = 512 * windows
    if split == "search":
        return (Measurement("kl", quality, "search", tokens),)
    return (
        Measurement("kl_held_out", 1.1 * quality, "held_out", tokens),
        Measurement("perplexity_held_out", 5.0 + quality, "held_out", tokens),
    )


class Sleeping:
    """A runner that opens nothing and sleeps instead of measuring; it stands where `RunnerProcess` does."""

    seconds = 0.0
    opened_at, opening_s = float("-inf"), 0.0

    def __init__(self, setup: EvaluationSetup, *_: Any) -> None:
        self._setup = setup
        self.digest: str | None = None

    def open(self, tick: Callable[[], None]) -> None:
        self.digest = self.digest or prepare(self._setup).digest

    def evaluate(self, request: EvaluationRequest, tick: Callable[[], None]) -> Measured:
        started = time.monotonic()
        while (left := started + self.seconds - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            tick()
        return Measured(values(request.levels, request.split, request.windows), time.monotonic() - started)

    def log_tail(self) -> str:
        return ""

    def close(self) -> None:
        return


class Crowd:
    """Simulated workers in threads of this process, each of which the database takes for a machine of its own.

    Args:
        store: Where they claim.
        number: How many.
        seconds: That each evaluation takes.
        lease_s: Of their claims.
    """

    def __init__(self, store: Store, number: int, seconds: float = 0.0, lease_s: float = 20.0) -> None:
        self.store, self._seconds, self._lease_s = store, seconds, lease_s
        self._stop = threading.Event()
        self.spans: list[tuple[float, float]] = []  # monotonic begin and end of every evaluation
        self._names = [f"simulated/none/{i}/0.00" for i in range(number)]
        self._threads = [threading.Thread(target=self._work, args=(name,)) for name in self._names]
        self._threads.append(threading.Thread(target=self._live))

    def __enter__(self) -> Crowd:
        for name in self._names:
            self.store.announce_worker(name, ["cpu"], "cpu", {}, self._lease_s)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _live(self) -> None:
        while not self._stop.wait(self._lease_s / 3):
            for name in self._names:
                self.store.worker_seen(name, self._lease_s)

    def _work(self, name: str) -> None:
        rng = random.Random(name)
        while not self._stop.is_set():
            try:
                if not self._one(name, rng):
                    self._stop.wait(rng.uniform(0.02, 0.06))
            except StorageError as error:
                sys.stderr.write(f"{name}: {error}\n")

    def _one(self, name: str, rng: random.Random) -> bool:
        queued = self.store.waiting(["cpu"], len(self._names))
        for evaluation_id in rng.sample(queued, min(4, len(queued))):
            if (claim := self.store.claim(evaluation_id, name, self._lease_s)) is not None:
                begun = time.monotonic()
                while (left := begun + self._seconds - time.monotonic()) > 0 and not self._stop.wait(min(left, self._lease_s / 3)):
                    if left > self._lease_s / 3:
                        self.store.renew(claim, self._lease_s)
                ended = time.monotonic()
                self.report(claim, ended - begun)
                self.spans.append((begun, ended))
                return True
        return False

    def report(self, claim: Claim, seconds: float) -> None:
        """Writes the outcome of an evaluation down."""
        self.store.complete(claim, values(claim.configuration.levels, claim.split, claim.windows), seconds)


def fill(store: Store, job: Job, problem: Problem, count: int, seed: int = 0) -> None:
    """Gives a job trials up to `count` that succeeded at random configurations of its space, as if they had been searched."""
    rng = random.Random(seed)
    _insert(store, job, count, _samples(problem, rng), problem.windows)


def fill_thinly(store: Store, job: Job, count: int, windows: int, seed: int = 0) -> None:
    """As `fill`, with configurations that are none of the space: a million of those take minutes."""
    rng = random.Random(seed)

    def samples() -> Iterator[tuple[Configuration, dict[str, float]]]:
        for n in range(count):
            bits = rng.choice((2, 3, 4, 8))
            costs = {"avg_bits": bits + rng.random(), "linear_bytes": 1e5 * (bits + rng.random()), "kv_bytes": 4096.0}
            yield (
                Configuration({"a:bits": bits, "b:bits": n, "c:bits": count}),
                costs | {"weight_bytes": costs["linear_bytes"] + 9e4, "bytes_per_token": 1e5, "flops_per_token": 3e6},
            )

    _insert(store, job, count, samples(), windows)


def _samples(problem: Problem, rng: random.Random) -> Iterator[tuple[Configuration, dict[str, float]]]:
    while True:
        indices = problem.space.normalised(problem.space.sample(rng))
        if problem.feasible(indices):
            yield problem.space.at(indices), {m.name: m.value for m in problem.cost_model.measurements(indices)}


def _insert(store: Store, job: Job, count: int, samples: Iterator[tuple[Configuration, dict[str, float]]], windows: int) -> None:
    numbers, seen = iter(range(job.counts.trials, count)), set[str]()
    with store.database.read() as connection:
        first = (connection.exec_driver_sql("SELECT max(id) FROM evaluation").scalar() or 0) + 1
    at = first
    while chunk := list(islice(numbers, _CHUNK)):
        rows: dict[Any, list[dict[str, Any]]] = {ConfigurationRow: [], EvaluationRow: [], TrialRow: [], MeasurementRow: []}
        for number in chunk:
            configuration, costs = next(samples)
            while configuration.digest in seen:
                configuration, costs = next(samples)
            seen.add(configuration.digest)
            rows[ConfigurationRow].append({"digest": configuration.digest, "canonical": configuration.canonical})
            key = evaluation_key(job.setup_digest, configuration.digest, "search", windows)
            work = {"id": at, "configuration": configuration.digest, "eval_key": key, "split": "search", "windows": windows, "queue": "cpu"}
            ended = {"state": State.SUCCEEDED, "attempts": 1, "losses": 0, "fence": 1, "accepted_fence": 1}
            rows[EvaluationRow].append(work | ended)
            wish = {"job_id": job.id, "number": number, "evaluation_id": at, "origin": "searched", "feasible": True, "cost": 1.0}
            rows[TrialRow].append(wish | {"costs": costs})
            rows[MeasurementRow] += [values_of(at, item) for item in values(configuration.levels, "search", windows)]
            at += 1
        with store.database.write() as connection:
            for table, clock in ((ConfigurationRow, {}), (EvaluationRow, {"created_at": now(), "ended_at": now()}), (MeasurementRow, {})):
                connection.execute(
                    (_ignoring(table, connection) if table is ConfigurationRow else insert(table)).values(**clock), rows[table]
                )
            connection.execute(insert(TrialRow).values(created_at=now(), told_at=now()), rows[TrialRow])
            added = {"trials": JobRow.trials + len(chunk), "succeeded": JobRow.succeeded + len(chunk), "cost": JobRow.cost + len(chunk)}
            connection.execute(update(JobRow).where(JobRow.id == job.id).values(added))


def _ignoring(table: Any, connection: Any) -> Any:
    from sqlalchemy.dialects import postgresql, sqlite

    return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name](table).on_conflict_do_nothing()


def state_of(store: Store, job_id: str, state: JobState) -> None:
    """Puts a filled job into a state, without whoever would drive it."""
    with store.database.write() as connection:
        connection.execute(
            update(JobRow)
            .where(JobRow.id == job_id)
            .values(state=state, coordinator=None, coordinator_until=None, version=JobRow.version + 1)
        )


app = typer.Typer(add_completion=False)


@app.callback()
def _verbs() -> None:
    """Simulated parts of a service."""


@app.command()
def worker(seconds: float = 0.0) -> None:
    """`autoeff worker`, whose evaluations sleep."""
    from autoeff.commands_service import worker as real

    Sleeping.seconds = seconds
    station.RunnerProcess = Sleeping  # type: ignore[misc, assignment]
    real()


if __name__ == "__main__":
    app()
