"""A search of a model as it was planned: all that it goes by, without the model, its text, or the libraries that read them.

Who drives a submitted job makes it from what the database holds; `model.plan` makes it from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from autoeff.errors import InputError, RunnerLost
from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.evaluators.setup import EVALUATOR_VERSION, measurement_from_json
from autoeff.search.attribution import alternatives, attribution
from autoeff.search.guests import DamageTable, Proposing, left_to_search, preamble, table_candidates, table_form
from autoeff.search.job import JobSpec
from autoeff.search.limits import Limit, least_reachable
from autoeff.search.results import Results
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.search.seed import Given, Seed, make_seeds
from autoeff.search.settings import Settings
from autoeff.search.standing import problem_of
from autoeff.search.storage.records import Job, Trial
from autoeff.search.subject import Guests
from autoeff.search.worker import Runner
from autoeff.spaces.space import SearchSpace

__all__ = ["TIMED_POINTS", "PlannedJob", "answered"]

TIMED_POINTS = 3  # operating points of which finalists are timed end to end
_TRIES = 3  # runners that may be lost meanwhile


@dataclass(frozen=True)
class PlannedJob:
    """What a coordinator must know.

    Attributes:
        problem: What the samplers are told: space, costs, reachable limits, objectives, budget, seed.
        digest: Of all that values depend on besides the configuration.
        preflight: Model, text, memory, hardware, notices, as stored with the job.
    """

    spec: JobSpec
    problem: Problem
    digest: str
    preflight: Mapping[str, Any]

    @classmethod
    def stored(cls, job: Job) -> PlannedJob:
        """The plan of a job that was submitted.

        Raises:
            InputError: Its values would not be those of this version.
        """
        there = job.preflight.get("evaluator"), _release(str(job.preflight["torch"]))
        here = EVALUATOR_VERSION, _release(version("torch"))
        if here != there:
            raise InputError(
                f"job {job.id} was submitted to evaluation {there[0]} with torch {there[1]}; here are {here[0]} and {here[1]}, "
                "so submit it again"
            )
        return cls(JobSpec.parse(job.spec), problem_of(job), job.setup_digest, job.preflight)

    @property
    def space(self) -> SearchSpace:
        return self.problem.space

    @property
    def limits(self) -> tuple[Limit, ...]:
        return self.problem.limits

    @property
    def notices(self) -> Sequence[str]:
        return list(self.preflight["notices"])

    @property
    def sampler(self) -> str | None:
        return None if self.spec.table_only else self.spec.sampler

    @property
    def budget(self) -> float:
        if not self.spec.table_only:
            return float(self.problem.trials)
        return 1.0 + sum(candidate.windows for candidate in table_candidates(self.problem)) / self.problem.windows

    @property
    def seconds(self) -> float | None:
        return self.spec.budget.seconds

    @property
    def held_out_windows(self) -> int:
        return int(self.preflight["text"]["held_out"]["windows"])

    @property
    def table(self) -> str:
        """Form that the damage table takes under this budget."""
        return table_form(self.space, self.spec.budget.trials, self.problem.windows)

    @property
    def left_to_search(self) -> int:
        """Evaluations that the budget leaves to the sampler."""
        return 0 if self.spec.table_only else left_to_search(self.problem)

    @property
    def least(self) -> Mapping[str, float]:
        """Least reachable value of each cost measure."""
        return {name: float(least_reachable(self.problem.cost_model, name)) for name in self.problem.cost_model.measures}

    @property
    def dense(self) -> Mapping[str, float]:
        """The dense model's value of each cost measure."""
        return {name: float(self.problem.cost_model.dense(name)) for name in self.problem.cost_model.measures}

    def guests(self, runner: Runner | None = None) -> Guests:
        return preamble(self.problem, table_only=self.spec.table_only, seeds=lambda table: self._seeds(table, runner))

    def _seeds(self, table: DamageTable, runner: Runner | None) -> Proposing:
        """What each rule makes of each operating point; the same configuration once."""
        seeds = make_seeds(self.spec.seeds, list(self.spec.knobs))
        if self.spec.seeds is None and runner is None:  # none was asked for by name, and nobody here knows the model
            seeds = [seed for seed in seeds if not seed.needs]
        needs = sorted(set().union(*(seed.needs for seed in seeds)))
        statistics = ModelStatistics()
        if needs:
            if not isinstance(runner, RunnerProcess):
                asking = next(seed.name for seed in seeds if seed.needs)
                raise InputError(f"seed {asking} goes by {', '.join(needs)} of the model, which only a search without a server knows")
            statistics = ModelStatistics.from_json(answered(runner, {"kind": "statistics", "needs": needs})["statistics"])
        given = Given(self.problem, (), table.damage, self.problem.cost_model.context, statistics=statistics)
        if "kv_budget" in self.spec.knobs:
            given = self._with_lengths(given)
        found: dict[tuple[int, ...], Candidate] = {}
        for point in self.problem.operating_points:
            for seed in seeds:
                indices = yield from _stepped(seed, replace(given, limits=point.limits))
                if indices is not None:
                    found.setdefault(indices, Candidate(indices, self.problem.windows, "seed", seed.name))
        return list(found.values())

    def _with_lengths(self, given: Given) -> Given:
        from autoeff.spaces.knob import make_knob  # which imports torch
        from autoeff.spaces.knobs.kv_budget import KvBudget

        budget = make_knob("kv_budget", self.spec.knobs["kv_budget"])
        assert isinstance(budget, KvBudget)
        sizes = budget.sizes(given.context)
        return replace(given, least=sizes.least, window=sizes.window)

    def runner(self, settings: Settings, log: Path, progress: Callable[[int, int], None]) -> RunnerProcess:
        return RunnerProcess(self.spec.setup(settings.bank), settings, log, progress)

    def beside_found(self, results: Results, trials: Sequence[Trial]) -> list[Candidate]:
        found = {a.indices: a for a in reversed(alternatives(results, self._table(trials)))}
        return [Candidate(a.indices, self.held_out_windows, "alternative", f"{a.knob}={a.level}") for a in reversed(found.values())]

    def _table(self, trials: Sequence[Trial]) -> DamageTable:
        problem = self.problem
        indices = problem.space.indices
        known = {(indices(t.configuration.levels), t.windows): t.value(problem.quality) for t in trials if t.split == "search"}
        return DamageTable.measured(problem, known)

    def closing(self, results: Results, trials: Sequence[Trial], runner: Runner | None) -> dict[str, Any]:
        table = self._table(trials)
        said: dict[str, Any] = {"table": {"form": self.table, "damage": results.damage(table)}, "additivity": results.additivity(table)}
        if self.spec.table_only:  # nothing was searched, so nothing was found, and nothing missed
            return said | {"state": "feasible", "front": [], "found": None, "closest": None, "completions": None}
        return said | {"completions": None, "latency": self._times(results, {}, None), "attribution": attribution(results, table)}

    def _timed(self, results: Results) -> dict[str, Trial]:
        """Whose times are told: dense, and of the first operating points the best uniform level and what was found."""
        named: dict[str, Trial | None] = {"dense": results.full.get(self.space.dense_configuration.digest)}
        for point in self.problem.operating_points[:TIMED_POINTS]:
            best = next((t for t in results.within(point.limits) if t.origin == "uniform"), None)
            named |= {f"uniform {point.name}": best, f"found {point.name}": results.found(point)}
        return {label: trial for label, trial in named.items() if trial is not None}

    def _times(self, results: Results, measured: Mapping[str, Any], failure: str | None) -> dict[str, Any] | None:
        """Their times as predicted, beside what was `measured` end to end, or why it was not."""
        if (latency := self.preflight.get("latency")) is None:
            return None
        rows = []
        for label, trial in self._timed(results).items():
            costs = self.problem.cost_model.measurements(self.space.indices(trial.configuration.levels))
            times = {m.name: {"predicted": m.to_json()} for m in costs if m.method != "exact"}
            for m in map(measurement_from_json, measured.get(label, ())):
                times[m.name]["measured"] = m.to_json()
            rows.append({"role": label.partition(" ")[0], "point": label.partition(" ")[2] or None, "trial": trial.number, "times": times})
        return {**latency, "failure": failure, "rows": rows}


def answered(runner: RunnerProcess, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer, of another runner if one is lost. Raises as `RunnerProcess.ask`."""
    for _ in range(_TRIES - 1):
        try:
            return runner.ask(message)
        except RunnerLost:
            continue
    return runner.ask(message)


def _stepped(seed: Seed, given: Given) -> Generator[list[Candidate], Sequence[float | None], tuple[int, ...] | None]:
    """What a rule proposes, after the measurements that it asks for on a quarter of the windows."""
    steps, problem = seed.steps(given), given.problem
    try:
        asked = next(steps)
        while True:
            values = yield [Candidate(indices, problem.few_windows, "seed", f"on the way of {seed.name}") for indices in asked]
            asked = steps.send([inf if value is None else value for value in values])
    except StopIteration as end:
        found: tuple[int, ...] | None = end.value
        return found


def _release(name: str) -> str:
    """Without what the build is for."""
    return name.partition("+")[0]
