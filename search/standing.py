"""Where a job stands: its front and its best trial, while it runs and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from autoeff.search.limits import parse_limit
from autoeff.search.own_job import OwnJob, is_own
from autoeff.search.pareto import Archive
from autoeff.search.samplers.problem import Problem
from autoeff.search.storage.records import Job, State
from autoeff.search.storage.scan import Brief, Scan
from autoeff.search.storage.store import Store
from autoeff.spaces.costs import LATENCIES, CostModel
from autoeff.spaces.measurements import MEASURES
from autoeff.spaces.space import SearchSpace

__all__ = ["TABLE_WORDS", "Standing", "Tally", "cost_columns", "cost_titles", "judged_cost", "problem_of", "standing_of"]


TABLE_WORDS: Mapping[str, str] = {
    "full": "every level on all windows",
    "quarter": "every level on a quarter of the windows",
    "cheap": "two levels of each decision on a quarter of the windows",
}
"""The forms of the damage table for people."""


@dataclass(frozen=True)
class Standing:
    """What a search has found so far.

    Attributes:
        quality: Name of the job's quality measurement.
        front: Numbers of the trials on the Pareto front of its objectives, the limits kept.
        best: The trial of least quality loss within the limits; the closest to them where the search ended without; None where there
            is neither.
        best_quality: Its quality on the search text.
        feasible: Whether `best` keeps the limits.
    """

    quality: str
    front: tuple[int, ...]
    best: int | None
    best_quality: float | None
    feasible: bool


class Tally:
    """The standing of a job that is going on, kept up as its trials end.

    It holds the front alone, takes trials in any order and any of them again, and says what `Results` says of all of them.

    Args:
        store: Holds the job.
        job: The job.
    """

    def __init__(self, store: Store, job: Job) -> None:
        self._problem = problem_of(job)
        self._on_values = [limit for limit in self._problem.limits if limit.name not in self._problem.cost_model.measures]
        names = {name.removeprefix("-") for name in self._problem.objectives} | {limit.name for limit in self._on_values}
        self._scan = Scan(store.database, job.id, names)
        self._front = Archive()
        self._best: tuple[float, int, float | None] | None = None

    def read_all(self, trials: int) -> None:
        """Takes the first `trials` trials."""
        self._add(self._scan.all(trials))

    def read(self, numbers: Iterable[int]) -> None:
        """Takes these trials."""
        self._add(self._scan.of(list(numbers)))

    @property
    def standing(self) -> Standing:
        """Of the trials so far."""
        quality, front = self._problem.quality, tuple(self._front.keys)
        if self._best is None:
            return Standing(quality, front, None, None, feasible=False)
        return Standing(quality, front, self._best[1], self._best[2], feasible=True)

    def to_json(self) -> dict[str, Any]:
        """What `restore` takes up again."""
        return {"front": [[*point, key] for point, key in zip(self._front.points, self._front.keys, strict=True)], "best": self._best}

    def restore(self, value: Mapping[str, Any]) -> None:
        """Goes on from what another tally of the same job held."""
        for *point, key in value["front"]:
            self._front.add(point, key)
        self._best = None if value["best"] is None else tuple(value["best"])

    def _add(self, trials: Iterable[Brief]) -> None:
        problem = self._problem
        for trial in trials:
            if (trial.state, trial.split, trial.windows) != (State.SUCCEEDED, "search", problem.windows) or not trial.feasible:
                continue
            values = trial.values
            if not all(limit.name in values and limit.met(values[limit.name]) for limit in self._on_values):
                continue
            point = [-values.get(name[1:], inf) if name.startswith("-") else values.get(name, inf) for name in problem.objectives]
            self._front.add(point, trial.number)  # but for a point that is not whole
            candidate = (point[0] if problem.quality in values else inf, trial.number, values.get(problem.quality))
            if self._best is None or candidate[:2] < self._best[:2]:
                self._best = candidate


def standing_of(store: Store, job: Job) -> Standing:
    """The standing of a job: what its summary says, or for one without, what its trials say now."""
    if job.result is None:
        tally = Tally(store, job)
        tally.read_all(job.counts.trials)
        return tally.standing
    quality = str(job.preflight["quality"])
    feasible = job.result["state"] == "feasible"
    best = job.result["found"] if feasible else job.result["closest"]
    value = None if best is None else store.trial(job.id, best).value(quality)
    return Standing(quality, tuple(job.result["front"]), best, value, feasible)


def problem_of(job: Job) -> Problem:
    """What a stored job searches, without its model or code."""
    if is_own(job):
        return OwnJob.from_json(job.spec).problem
    spec, preflight = job.spec, job.preflight
    space, quality = SearchSpace.from_json(job.space), str(preflight["quality"])
    cost_model = CostModel(space, batch=spec["batch"], context=spec["context"] or preflight["model"]["context"])
    return Problem(
        space=space,
        cost_model=cost_model,
        limits=tuple(parse_limit(text, cost_model, quality) for text in spec["limits"]),
        objectives=tuple(quality if name == "quality" else name for name in spec["objectives"]),
        trials=spec["budget"]["trials"],
        windows=preflight["text"]["search"]["windows"],
        seed=spec["seed"],
        max_degradation=spec.get("tasks", {}).get("max_degradation"),
    )


def cost_columns(job: Job) -> list[str]:
    """The measures worth a column beside the quality: those of the limits and the objectives, and the average bits of a model."""
    if is_own(job):
        own = OwnJob.from_json(job.spec)
        return [name for name in own.needed if name != own.problem.quality]
    return list(dict.fromkeys([*_limited(job), *job.spec["objectives"][1:], "avg_bits"]))


def cost_titles(job: Job) -> dict[str, str]:
    """Every cost that is not exact, by name, with how it came about: `decode_ms (predicted)`."""
    return {name: f"{name} ({method})" for quantity, (name, method) in LATENCIES.items() if quantity in job.space.get("dense", {})}


def judged_cost(job: Job) -> str:
    """The cost at which configurations are compared: the first with a limit, else the first objective on a cost, else the stored bytes.

    Own code has no costs: the other axis of its front.
    """
    if is_own(job):
        return problem_of(job).cost_measure
    return str([*_limited(job), *job.spec["objectives"][1:], "weight_bytes"][0])


def _limited(job: Job) -> list[str]:
    names = [text.partition("<=")[0].strip() for text in job.spec["limits"]]
    return [name for name in names if name in MEASURES and MEASURES[name].kind == "cost"]
