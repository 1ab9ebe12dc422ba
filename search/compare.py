"""Runs side by side: what each found, the best of each at common budgets, and in which settings they differ.

Values are compared only where they mean the same: the same model, the same search text, the same quality measure. The held-out values are
left out where only the held-out texts differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeff.errors import InputError
from autoeff.search.job import JobSpec
from autoeff.search.limits import Limit
from autoeff.search.own_job import NUMBER, is_own
from autoeff.search.pareto import non_dominated
from autoeff.search.results import Results, all_trials
from autoeff.search.runs import check_new, open_run, write_file
from autoeff.search.samplers.problem import OperatingPoint, Problem
from autoeff.search.settings import Settings
from autoeff.search.standing import judged_cost, problem_of, standing_of
from autoeff.search.storage.records import Job, Trial
from autoeff.spaces.costs import LATENCIES

__all__ = ["Comparison", "compare", "write_fronts"]

_TIMES = {name for name, _ in LATENCIES.values()}


@dataclass(frozen=True)
class Comparison:
    """What runs have in common and in what they differ. Lists with an item for every run have the order of `runs`.

    Attributes:
        quality: Name of the quality measure of all runs.
        cost: Name of the cost over which the fronts are drawn.
        method: How its values came about, where they are not exact: `predicted` or `estimated`.
        own: Whether the runs searched the user's own code.
        runs: Name, job, state, evaluations used and `found`: the trial that its search found (else the closest); None before there is one.
        budgets: `budget`, `bound` on `cost` (None where it limits another cost), the `best` of each run within it, and the `winner`.
        settings: What differs, by name: the value of each run.
        decisions: Levels of the found configurations, where they differ and every run has that decision.
        fronts: For each run its non-dominated trials over quality and cost, limits left aside.
        notices: What to know of these values.
    """

    quality: str
    cost: str
    method: str | None
    own: bool
    runs: tuple[dict[str, Any], ...]
    budgets: tuple[dict[str, Any], ...]
    settings: Mapping[str, list[Any]]
    decisions: Mapping[str, list[Any]]
    fronts: tuple[tuple[dict[str, Any], ...], ...]
    notices: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "quality": self.quality, "cost": self.cost, "method": self.method, "own": self.own, "runs": list(self.runs),
            "budgets": list(self.budgets),
            "settings": dict(self.settings), "decisions": dict(self.decisions), "fronts": [list(front) for front in self.fronts],
            "notices": list(self.notices),
        }  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """One run, read.

    Attributes:
        name: As the user wrote it.
        best: What it found; None before there is anything.
    """

    name: str
    job: Job
    problem: Problem
    results: Results
    best: Trial | None


def compare(runs: Sequence[str], settings: Settings) -> Comparison:
    """Compares finished or running searches.

    Args:
        runs: Run directories or job ids, at least two.
        settings: Of this machine.

    Raises:
        InputError: Fewer than two, no such run, or runs whose values mean different things; the message says which and in what.
    """
    if len(runs) < 2:
        raise InputError("name at least two runs to compare")
    sides = [_read(run, settings) for run in runs]
    first = sides[0]
    for other in sides[1:]:
        _check_comparable(first, other)
    own = is_own(first.job)
    held_out = own or len({side.job.preflight["text"]["held_out"]["digest"] for side in sides}) == 1
    timed_alike = len({str(side.job.preflight.get("latency", {}).get("digest")) for side in sides}) == 1
    cost = judged_cost(first.job)
    if cost in _TIMES and not timed_alike:
        cost = "weight_bytes"
    points = [(point, bound) for point, bound in _points(sides, cost) if timed_alike or not _TIMES & {limit.name for limit in point.limits}]
    notices = [] if held_out else ["the held-out texts differ, so only values on the search text are compared"]
    if not timed_alike:
        notices.append("the runs are not timed by one latency table, so no budget in milliseconds is compared")
    return Comparison(
        quality=first.problem.quality,
        cost=cost,
        method=None if (form := first.problem.cost_model.measures.get(cost)) is None or form.method == "exact" else form.method,
        own=own,
        runs=tuple(_run(side, held_out) for side in sides),
        budgets=tuple(_budget(point, bound, sides, held_out) for point, bound in points),
        settings=_settings(sides),
        decisions=_decisions(sides),
        fronts=tuple(_front(side, cost) for side in sides),
        notices=tuple(notices),
    )


def write_fronts(comparison: Comparison, folder: Path) -> Path:
    """Draws the fronts into `folder`, which must not exist, and returns the path of `fronts.png`.

    Raises:
        InputError: `folder` exists or cannot be made.
    """
    from autoeff.search.picture import draw_fronts  # matplotlib takes longer than the comparison

    check_new(folder)
    lines = {
        run["run"]: [(point["cost"], point["quality"]) for point in front]
        for run, front in zip(comparison.runs, comparison.fronts, strict=True)
    }
    picture = draw_fronts(comparison.quality, comparison.cost, lines, linear=comparison.own, method=comparison.method)
    try:
        folder.mkdir(parents=True)
        write_file(folder / "fronts.png", picture)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; name another --out") from None
    return folder / "fronts.png"


def _read(run: str, settings: Settings) -> _Side:
    store, job_id, _ = open_run(run, settings)
    with store:
        job = store.job(job_id)
        problem = problem_of(job)
        best = standing_of(store, job).best
        return _Side(run, job, problem, Results(problem, all_trials(store, job_id)), None if best is None else store.trial(job_id, best))


def _check_comparable(one: _Side, other: _Side) -> None:
    a, b = one.job.preflight, other.job.preflight
    differing = []
    if is_own(one.job) != is_own(other.job):
        raise InputError(f"runs {one.name} and {other.name} cannot be compared: one searched a model and the other code of its own")
    if is_own(one.job):
        for what, values in {
            "code": [job.spec["model"] for job in (one.job, other.job)],
            "objective": [a["quality"], b["quality"]],
        }.items():
            if values[0] != values[1]:
                raise InputError(f"runs {one.name} and {other.name} cannot be compared: the {what} differs ({' and '.join(values)})")
        return
    if a["model"]["digest"] != b["model"]["digest"]:
        differing.append(f"the models differ ({one.job.spec['model']} and {other.job.spec['model']}, by their files' digests)")
    texts = a["text"]["search"], b["text"]["search"]
    if texts[0]["digest"] != texts[1]["digest"]:
        differing.append(f"the search texts differ ({' and '.join(map(_text, texts))})")
    if a["quality"] != b["quality"]:
        differing.append(f"the quality measures differ ({a['quality']} and {b['quality']})")
    if differing:
        raise InputError(f"runs {one.name} and {other.name} cannot be compared: {'; '.join(differing)}")


def _text(text: Mapping[str, Any]) -> str:
    source, _, _ = text["source"].partition(" (sha256")  # of the whole source; the digest is that of the windows
    return f"{text['windows']} x {text['length']} tokens of {source}, digest {text['digest'][:8]}"


def _run(side: _Side, held_out: bool) -> dict[str, Any]:
    found = None if side.best is None else _trial(side, side.best, held_out)
    job = side.job
    return {
        "run": side.name, "job": job.id, "state": str(job.state), "limits": list(job.spec["limits"]), "evaluations": job.counts.cost,
        "found": found,
    }  # fmt: skip


def _trial(side: _Side, trial: Trial, held_out: bool) -> dict[str, Any]:
    quality = side.problem.quality
    confirmed = side.results.held_out.get(trial.configuration.digest)
    value = None if confirmed is None or not held_out else confirmed.value(f"{quality}_held_out")
    return {
        "trial": trial.number,
        "digest": trial.configuration.digest,
        "origin": trial.origin,
        "costs": {m.name: m.value for m in trial.measurements if m.is_cost or (m.own and m.name != quality)},
        quality: trial.value(quality),
        f"{quality}_held_out": value,
    }


def _points(sides: Sequence[_Side], cost: str) -> Iterator[tuple[OperatingPoint, float | None]]:
    """The limits of every run, and the costs of the uniform levels of the first, by falling bound on `cost`; no budget twice."""
    first = sides[0].problem
    bounded = [side for side in sides if side.problem.cost_limits or is_own(side.job)]
    points = [point for side in bounded for point in side.problem.operating_points]
    for name, configuration in first.space.uniform.items():
        bound = first.cost_model.exact(cost, first.space.indices(configuration.levels))
        points.append(OperatingPoint(f"{cost} of {name}", (Limit(cost, bound, f"{cost}<={name}"),)))
    distinct = {tuple((limit.name, limit.bound, limit.lower) for limit in point.limits): point for point in reversed(points)}
    bounds = [(point, next((float(limit.bound) for limit in point.limits if limit.name == cost), None)) for point in distinct.values()]
    yield from sorted(bounds, key=lambda item: (item[1] is None, -(item[1] or 0.0), item[0].name))


def _budget(point: OperatingPoint, bound: float | None, sides: Sequence[_Side], held_out: bool) -> dict[str, Any]:
    best = [next(iter(side.results.within(point.limits)), None) for side in sides]
    values = [(side.results.quality(trial), side.name) for side, trial in zip(sides, best, strict=True) if trial is not None]
    leaders = [name for value, name in values if value == min(values)[0]]
    return {
        "budget": point.name or "any budget",
        "bound": bound,
        "best": [None if trial is None else _trial(side, trial, held_out) for side, trial in zip(sides, best, strict=True)],
        "winner": leaders[0] if len(leaders) == 1 else None,
    }


def _front(side: _Side, cost: str) -> tuple[dict[str, Any], ...]:
    sign = -1.0 if f"-{cost}" in side.problem.objectives else 1.0
    points = []
    for trial in side.results.full.values():
        at = trial.number if cost == NUMBER else trial.value(cost)
        if at is not None:
            points.append((trial, at))
    chosen = [points[i] for i in non_dominated([(side.results.quality(trial), sign * at) for trial, at in points])]
    name = side.problem.quality
    return tuple({"trial": t.number, "cost": at, "quality": t.value(name)} for t, at in sorted(chosen, key=lambda point: point[1]))


def _decisions(sides: Sequence[_Side]) -> dict[str, list[Any]]:
    if any(side.best is None for side in sides):
        return {}
    levels = [side.best.configuration.levels for side in sides if side.best is not None]
    common = [key for key in levels[0] if all(key in other for other in levels)]
    return {key: [other[key] for other in levels] for key in common if len({other[key] for other in levels}) > 1}


def _settings(sides: Sequence[_Side]) -> dict[str, list[Any]]:
    """The fields of the jobs that differ, and the facts of machine and package that values depend on."""
    facts = [
        dict(_flat(side.job.spec if is_own(side.job) else JobSpec.parse(side.job.spec).model_dump(mode="json")))
        | {name: side.job.preflight.get(name) for name in ("hardware", "torch")}
        for side in sides
    ]
    names = dict.fromkeys(name for fact in facts for name in fact)
    return {name: [fact.get(name) for fact in facts] for name in names if any(fact.get(name) != facts[0].get(name) for fact in facts)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
