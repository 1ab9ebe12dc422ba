"""Where a job stands: its front and its best trial, while it runs and after."""

from __future__ import annotations

from dataclasses import dataclass

from autoeff.search.pareto import non_dominated
from autoeff.search.results import all_trials, search_trials
from autoeff.search.storage.records import Job, Trial
from autoeff.search.storage.store import Store
from autoeff.spaces.measurements import MEASURES

__all__ = ["Standing", "cost_columns", "main_cost", "standing_of"]


@dataclass(frozen=True)
class Standing:
    """What a search has found so far.

    Attributes:
        quality: Name of the job's quality measurement.
        front: Numbers of the trials on the Pareto front of its objectives, the limits kept.
        best: The trial of least quality loss within the limits; the closest to them where the search ended without; None before
            there is any.
        best_quality: Its quality on the search text.
        feasible: Whether `best` keeps the limits.
    """

    quality: str
    front: tuple[int, ...]
    best: int | None
    best_quality: float | None
    feasible: bool


def standing_of(store: Store, job: Job) -> Standing:
    """The standing of a job: what its summary says, or for one without, what its trials say now."""
    quality = str(job.preflight["quality"])
    if job.result is not None:
        found = job.result["found"]
        value = None if found is None else store.trial(job.id, found).value(quality)
        return Standing(quality, tuple(job.result["front"]), found, value, job.result["state"] == "feasible")
    windows = int(job.preflight["text"]["search"]["windows"])
    trials = [trial for trial in search_trials(all_trials(store, job.id), quality, windows) if _keeps_limits(job, trial, quality)]
    names = [quality if name == "quality" else name for name in job.spec["objectives"]]
    points = [[trial.value(name) or 0.0 for name in names] for trial in trials]
    front = tuple(trials[i].number for i in non_dominated(points))
    best = min(trials, key=lambda trial: trial.value(quality) or 0.0, default=None)
    if best is None:
        return Standing(quality, front, None, None, feasible=False)
    return Standing(quality, front, best.number, best.value(quality), feasible=True)


def cost_columns(job: Job) -> list[str]:
    """The cost measures worth a column: those of the limits, of the objectives, and the average bits."""
    return list(dict.fromkeys([*_limited(job), *job.spec["objectives"][1:], "avg_bits"]))


def main_cost(job: Job) -> str:
    """The cost that the quality is shown against: the first in the objectives, else the first with a limit, else the stored bytes."""
    return str([*job.spec["objectives"][1:], *_limited(job), "weight_bytes"][0])


def _limited(job: Job) -> list[str]:
    names = [text.partition("<=")[0].strip() for text in job.spec["limits"]]
    return [name for name in names if name in MEASURES and MEASURES[name].kind == "cost"]


def _keeps_limits(job: Job, trial: Trial, quality: str) -> bool:
    """Costs were judged when the trial was proposed; a bound on the quality is an absolute number."""
    value = trial.value(quality)
    bounds = [text.partition("<=")[2] for text in job.spec["limits"] if text.partition("<=")[0].strip() in (quality, "quality")]
    return trial.feasible and value is not None and all(value <= float(bound) for bound in bounds)
