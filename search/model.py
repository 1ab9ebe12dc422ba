"""A search of a model from disk: what is known before any weight is loaded, its baselines, and what the end table adds."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from autoeff.errors import CandidateError, InputError, RunnerLost
from autoeff.evaluators.latency_table import PHASES
from autoeff.evaluators.loading import load_tokenizer
from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import LatencySpec, measurement_from_json
from autoeff.search.attribution import alternatives, attribution
from autoeff.search.guests import DamageTable, Proposing, left_to_search, minimum_trials, preamble, table_candidates, table_form
from autoeff.search.job import JobSpec
from autoeff.search.limits import Limit, check_reachable, least_reachable, parse_limit
from autoeff.search.results import Results
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.sampler import check_sampler
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.search.seed import Given, Seed, make_seeds
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Trial
from autoeff.search.subject import Guests
from autoeff.search.worker import Runner
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knobs.kv_budget import KvBudget
from autoeff.spaces.measurements import measure
from autoeff.spaces.space import SearchSpace

__all__ = ["Plan", "plan"]

_PROMPT_TOKENS = 48
_COMPLETION_TOKENS = 48
_TIMED_POINTS = 3  # operating points of which finalists are timed end to end
_LITTLE = 4  # a search with less than a fourth of its budget to itself is told so
_TRIES = 3  # runners that may be lost meanwhile


@dataclass(frozen=True)
class Plan:
    """What is known before any weight is loaded.

    Attributes:
        preflight: Model, text, memory, hardware, notices.
        minimum_trials: The least budget that holds dense, uniform levels, the cheap table and five more.
        table: Form that the damage table takes under this budget.
        problem: What the samplers are told: space, costs, reachable limits, objectives, budget, seed.
    """

    spec: JobSpec
    preparation: Preparation
    minimum_trials: int
    table: str
    problem: Problem

    @property
    def least(self) -> Mapping[str, float]:
        """Least reachable value of each cost measure."""
        return {name: float(least_reachable(self.problem.cost_model, name)) for name in self.problem.cost_model.measures}

    @property
    def dense(self) -> Mapping[str, float]:
        """The dense model's value of each cost measure."""
        return {name: float(self.problem.cost_model.dense(name)) for name in self.problem.cost_model.measures}

    @property
    def preflight(self) -> dict[str, Any]:
        return self.preparation.report() | {"notices": list(self.notices)}

    @property
    def space(self) -> SearchSpace:
        return self.preparation.space

    @property
    def limits(self) -> tuple[Limit, ...]:
        return self.problem.limits

    @property
    def digest(self) -> str:
        return self.preparation.digest

    @property
    def left_to_search(self) -> int:
        """Evaluations that the budget leaves to the sampler."""
        return 0 if self.spec.table_only else left_to_search(self.problem)

    @property
    def notices(self) -> Sequence[str]:
        found, left = self.preparation.notices, self.left_to_search
        if self.sampler not in (None, "none") and _LITTLE * left < self.problem.trials:
            found.append(
                f"of {self.problem.trials} evaluations about {left} are left to the search behind baselines and damage "
                "table; fewer knobs, fewer levels or more trials leave more"
            )
        return found

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
        return len(self.preparation.passages["held_out"].inputs)

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
            answer = _answered(runner, {"kind": "statistics", "needs": needs})["statistics"]
            statistics = ModelStatistics.from_json(answer)
        context = next((site.kv.context for site in self.preparation.structure.sites if site.kv is not None), 0)
        budget = self.preparation.knobs.get("kv_budget")
        sizes = budget.sizes(context) if isinstance(budget, KvBudget) else None
        found: dict[tuple[int, ...], Candidate] = {}
        for point in self.problem.operating_points:
            given = Given(self.problem, point.limits, table.damage, context, statistics=statistics)
            given = given if sizes is None else replace(given, least=sizes.least, window=sizes.window)
            for seed in seeds:
                indices = yield from _stepped(seed, given)
                if indices is not None:
                    found.setdefault(indices, Candidate(indices, self.problem.windows, "seed", seed.name))
        return list(found.values())

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
        asked = runner if isinstance(runner, RunnerProcess) else None
        completions = None if asked is None else self._completions(results, asked)
        said |= {"completions": completions, "latency": self._times(results, asked), "attribution": attribution(results, table)}
        return said if self.preparation.tuning is None or asked is None else said | {"from_scratch": self._from_scratch(results, asked)}

    def _from_scratch(self, results: Results, runner: RunnerProcess) -> list[dict[str, Any]]:
        """Held-out losses of the best uniform level and of what was found: with a prefix of the adapter, and with one of its own."""
        rows = []
        for point in self.problem.operating_points[:_TIMED_POINTS]:
            best = next((t for t in results.within(point.limits) if t.origin == "uniform"), None)
            for role, trial in (("uniform", best), ("found", results.found(point))):
                if trial is None:
                    continue
                confirmed = results.held_out.get(trial.configuration.digest)
                row = {"role": role, "point": point.name, "trial": trial.number, "label": trial.label}
                row |= {"prefix": None if confirmed is None else confirmed.value("loss_held_out"), "from_scratch": None, "failure": None}
                try:
                    found = runner.trained(trial.configuration.levels)
                    row["from_scratch"] = next(m.value for m in found.measurements if m.name == "loss_held_out")
                except (CandidateError, RunnerLost) as error:
                    row["failure"] = str(error)
                rows.append(row)
        return rows

    def _times(self, results: Results, runner: RunnerProcess | None) -> dict[str, Any] | None:
        """Times of dense, the best uniform level and what was found, predicted and measured end to end."""
        if (latency := self.preparation.latency) is None:
            return None
        named: dict[str, Trial | None] = {"dense": results.full.get(self.problem.space.dense_configuration.digest)}
        for point in self.problem.operating_points[:_TIMED_POINTS]:
            best = next((t for t in results.within(point.limits) if t.origin == "uniform"), None)
            named |= {f"uniform {point.name}": best, f"found {point.name}": results.found(point)}
        trials = {label: trial for label, trial in named.items() if trial is not None}
        measured: Mapping[str, Any] = {}
        failure = None
        if latency.method == "predicted" and runner is not None:
            levels = {label: dict(trial.configuration.levels) for label, trial in trials.items()}
            try:
                measured = _answered(runner, {"kind": "latency", "configurations": levels, "spec": asdict(latency.spec)})["times"]
            except (CandidateError, RunnerLost, InputError) as error:  # such as a model that does not fit beside itself
                failure = str(error)
        rows = []
        for label, trial in trials.items():
            costs = self.problem.cost_model.measurements(self.problem.space.indices(trial.configuration.levels))
            times = {m.name: {"predicted": m.to_json()} for m in costs if m.method != "exact"}
            for m in map(measurement_from_json, measured.get(label, ())):
                times[m.name]["measured"] = m.to_json()
            rows.append({"role": label.partition(" ")[0], "point": label.partition(" ")[2] or None, "trial": trial.number, "times": times})
        return {**latency.report(), "failure": failure, "rows": rows}

    def _completions(self, results: Results, runner: RunnerProcess) -> dict[str, str] | None:
        """The same prompt completed by dense, the best uniform level within the limits, and what was found."""
        if self.preparation.facts.task != "decoder":
            return None
        within = results.within(self.problem.operating_points[0].limits)
        named = {
            "dense": results.full.get(self.problem.space.dense_configuration.digest),
            "uniform": next((t for t in within if t.origin == "uniform"), None),
            "found": results.found(self.problem.operating_points[0]),
        }
        ids = self.preparation.passages["held_out"].inputs[0, :_PROMPT_TOKENS]
        prompt = str(load_tokenizer(self.preparation.facts).decode(ids, skip_special_tokens=True))
        texts = {"prompt": prompt}
        for name, trial in named.items():
            if trial is not None and (text := _completed(runner, trial, prompt)) is not None:
                texts[name] = text
        return texts


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


def plan(spec: JobSpec, settings: Settings, queue: str | None = None, prepared: Callable[..., Preparation] = prepare) -> Plan:
    """Checks a job and works out what arithmetic can.

    Args:
        spec: The job.
        settings: Of this machine.
        queue: Of the workers that will evaluate; None for this process.
        prepared: Stands for `prepare`: `Preparations` remembers what it gave.

    Raises:
        InputError: Bad model, text, knobs, objectives or limits, or too small a budget.
        UnreachableLimit: No configuration keeps the limits.
    """
    check_sampler(spec.sampler)
    make_seeds(spec.seeds, list(spec.knobs))
    if spec.metrics and queue is not None:
        raise InputError(f"the metric {spec.metrics[0]!r} is code, which workers of a queue do not have; search without it")
    latency = _latency(spec, settings, queue)
    setup = replace(spec.setup(settings.bank), memory_bytes=settings.memory_cap, latency=latency, hardware=queue)
    preparation = prepared(setup, elsewhere=queue is not None)
    if spec.tasks.max_degradation is not None and not spec.tasks.names and preparation.passages["held_out"].labels is None:
        raise InputError("max_degradation is about accuracies; name tasks, or give images in folders that are labels of the model")
    context = spec.context or preparation.facts.context
    if context is None:
        raise InputError(f"model_type {preparation.facts.model_type!r} states no context length, which cache costs need; give --context")
    cost_model = CostModel(preparation.space, batch=spec.batch, context=context)
    objectives = _objectives(spec, preparation.quality, cost_model)
    limits = tuple(parse_limit(text, cost_model, preparation.quality) for text in spec.limits)
    check_reachable(limits, cost_model)
    windows = len(preparation.passages["search"].inputs)
    least = minimum_trials(preparation.space, windows)
    if spec.budget.trials < least:
        raise InputError(
            f"budget.trials is {spec.budget.trials}; this space needs at least {least} (dense, uniform levels, cheap table and 5)"
        )
    return Plan(
        spec=spec,
        preparation=preparation,
        minimum_trials=least,
        table=table_form(preparation.space, spec.budget.trials, windows),
        problem=Problem(
            preparation.space, cost_model, limits, objectives, spec.budget.trials, windows, spec.seed, spec.tasks.max_degradation
        ),
    )


def _latency(spec: JobSpec, settings: Settings, queue: str | None) -> LatencySpec | None:
    """What must be timed: nothing, unless an objective or a limit is on a time."""
    named = {*spec.objectives, *(text.partition("<")[0].strip() for text in spec.limits)}
    phases = tuple(phase for phase in PHASES if f"{phase}_ms" in named)
    if not phases:
        if spec.target is not None:
            raise InputError(f"target {spec.target!r} is given, but no objective and no limit is on decode_ms or prefill_ms")
        return None
    if queue is not None and spec.target is None:
        raise InputError(f"{phases[0]}_ms of the workers of queue {queue} is not measured yet; search on that machine, or give a target")
    return LatencySpec(phases, spec.batch, spec.context, str(settings.home / "latency"), spec.target)


def _completed(runner: RunnerProcess, trial: Trial, prompt: str) -> str | None:
    """The prompt with its continuation; None where that fails, which is no reason to lose a report."""
    message = {"kind": "complete", "levels": dict(trial.configuration.levels), "prompt": prompt, "tokens": _COMPLETION_TOKENS}
    try:
        return str(_answered(runner, message)["text"])
    except (CandidateError, RunnerLost, InputError):
        return None


def _answered(runner: RunnerProcess, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer, of another runner if one is lost. Raises as `RunnerProcess.ask`."""
    for _ in range(_TRIES - 1):
        try:
            return runner.ask(message)
        except RunnerLost:
            continue
    return runner.ask(message)


def _objectives(spec: JobSpec, quality: str, cost_model: CostModel) -> tuple[str, ...]:
    names = tuple(quality if name == "quality" else name for name in spec.objectives)
    if names[0] != quality:
        measure(names[0])
        raise InputError(f"the first objective is {names[0]!r}; on this model it must be {quality} (or the word quality)")
    for name in names[1:]:
        if name not in cost_model.measures:
            measure(name)
            raise InputError(f"objective {name!r} is no cost known before an evaluation; allowed: {', '.join(cost_model.measures)}")
    return names
