"""A search of a model from disk: what is known before any weight is loaded, its baselines, and what the end table adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autoeff.errors import CandidateError, InputError, RunnerLost
from autoeff.evaluators.latency_table import PHASES
from autoeff.evaluators.loading import load_tokenizer
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import LatencySpec
from autoeff.search.guests import left_to_search, minimum_trials
from autoeff.search.job import JobSpec
from autoeff.search.limits import check_reachable, parse_limit
from autoeff.search.planned import TIMED_POINTS, PlannedJob, answered
from autoeff.search.results import Results
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.sampler import check_sampler
from autoeff.search.samplers.problem import Problem
from autoeff.search.seed import make_seeds
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Trial
from autoeff.search.worker import Runner
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import measure

__all__ = ["Plan", "plan"]

_PROMPT_TOKENS = 48
_COMPLETION_TOKENS = 48
_LITTLE = 4  # a search with less than a fourth of its budget to itself is told so


@dataclass(frozen=True)
class Plan(PlannedJob):
    """What is known of a job before any weight is loaded, with the model and the text at hand.

    Attributes:
        minimum_trials: The least budget that holds dense, uniform levels, the cheap table and five more.
    """

    preparation: Preparation
    minimum_trials: int

    def closing(self, results: Results, trials: Sequence[Trial], runner: Runner | None) -> dict[str, Any]:
        said = super().closing(results, trials, runner)
        if self.spec.table_only or not isinstance(runner, RunnerProcess):
            return said
        said |= {"completions": self._completions(results, runner), "latency": self._times(results, *self._measured_times(results, runner))}
        return said if self.preparation.tuning is None else said | {"from_scratch": self._from_scratch(results, runner)}

    def _from_scratch(self, results: Results, runner: RunnerProcess) -> list[dict[str, Any]]:
        """Held-out losses of the best uniform level and of what was found: with a prefix of the adapter, and with one of its own."""
        rows = []
        for point in self.problem.operating_points[:TIMED_POINTS]:
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

    def _measured_times(self, results: Results, runner: RunnerProcess) -> tuple[Mapping[str, Any], str | None]:
        """Of those whose times are told, end to end; or why not."""
        latency = self.preparation.latency
        if latency is None or latency.method != "predicted":
            return {}, None
        levels = {label: dict(trial.configuration.levels) for label, trial in self._timed(results).items()}
        try:
            return answered(runner, {"kind": "latency", "configurations": levels, "spec": asdict(latency.spec)})["times"], None
        except (CandidateError, RunnerLost, InputError) as error:  # such as a model that does not fit beside itself
            return {}, str(error)

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
    windows = len(preparation.passages["search"].inputs)
    cost_model = CostModel(preparation.space, batch=spec.batch, context=context)
    objectives = _objectives(spec, preparation.quality, cost_model)
    limits = tuple(parse_limit(text, cost_model, preparation.quality) for text in spec.limits)
    check_reachable(limits, cost_model)
    problem = Problem(preparation.space, cost_model, limits, objectives, spec.budget.trials, windows, spec.seed, spec.tasks.max_degradation)
    least = minimum_trials(preparation.space, windows)
    if spec.budget.trials < least:
        raise InputError(
            f"budget.trials is {spec.budget.trials}; this space needs at least {least} (dense, uniform levels, cheap table and 5)"
        )
    preflight = preparation.report()
    preflight["notices"] += _little_left(spec, problem)
    return Plan(spec, problem, preparation.digest, preflight, preparation, least)


def _little_left(spec: JobSpec, problem: Problem) -> list[str]:
    left = left_to_search(problem)
    if spec.table_only or spec.sampler == "none" or _LITTLE * left >= problem.trials:
        return []
    return [
        f"of {problem.trials} evaluations about {left} are left to the search behind baselines and damage "
        "table; fewer knobs, fewer levels or more trials leave more"
    ]


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
        return str(answered(runner, message)["text"])
    except (CandidateError, RunnerLost, InputError):
        return None


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
