"""From a snapshot of a job to what its page says and draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from autoeff.dashboard.fetch import Snapshot, Terrain
from autoeff.dashboard.figures.front import Dot, Guest
from autoeff.dashboard.figures.progress import Step, bests_of, steps_of
from autoeff.dashboard.theme import ROLES
from autoeff.dashboard.words import moment
from autoeff.errors import InputError
from autoeff.search.limits import parse_limit

__all__ = [
    "Pace", "bests_over", "bounds_of", "dominated_over", "dots_of", "front_of", "guests_of", "is_open", "pace_of", "rivals_of", "verdict",
]  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """How far a job is.

    Attributes:
        share: Of its budget, from 0 to 1.
        elapsed_s: Since it was submitted, to its end where it has one.
        left_s: Until the budget is used at the pace so far; None where that cannot be said.
    """

    share: float
    elapsed_s: float
    left_s: float | None


def pace_of(job: Any, now: datetime) -> Pace:
    """How far a job is at this moment."""
    ended = now if job.ended is None else moment(job.ended)
    elapsed = max(0.0, (ended - moment(job.created)).total_seconds())
    share = min(1.0, job.used / job.budget) if job.budget else 0.0
    if job.state == "succeeded":
        return Pace(1.0, elapsed, 0.0)
    left = elapsed * (1 - share) / share if job.state == "running" and share > 0.02 else None
    return Pace(share, elapsed, left)


def dots_of(snapshot: Snapshot) -> list[Dot]:
    """The trials of the picture that were measured on the whole search text."""
    return [Dot(point.trial, point.origin, point.x, point.y) for point in snapshot.whole]


def front_of(snapshot: Snapshot) -> list[Dot]:
    """Those on the front."""
    return [Dot(point.trial, point.origin, point.x, point.y) for point in snapshot.whole if point.front]


def guests_of(snapshot: Snapshot) -> list[Guest]:
    """The baselines, and what was found: of the end table, or while there is none, what is known so far."""
    quality, cost = snapshot.job.quality, snapshot.job.judged_cost
    if snapshot.result is not None:
        return [
            Guest(row["role"], _label(snapshot, row), row["trial"], row["trial"] if cost == "trial" else row["costs"][cost], row["search"])
            for row in snapshot.result["rows"]
            if row["search"] is not None and (cost == "trial" or cost in row["costs"])
        ]
    found = []
    for point in snapshot.whole:
        if point.origin == "dense":
            found.append(Guest("dense", "reference" if snapshot.own else "dense", point.trial, point.x, point.y))
        elif point.origin == "uniform":
            found.append(Guest("uniform", snapshot.uniform.get(point.trial, "uniform"), point.trial, point.x, point.y))
    best = snapshot.best
    if best is not None and cost in best.measurements and quality in best.measurements:
        found.append(Guest("found", "best so far", best.trial, best.measurements[cost].value, best.measurements[quality].value))
    return found


def bounds_of(snapshot: Snapshot, terrain: Terrain | None) -> dict[str, float]:
    """The tightest upper bound of the job's limits on each cost, in the order of the limits."""
    bounds: dict[str, float] = {}
    if terrain is None:
        return bounds
    for text in snapshot.job.limits:
        try:
            limit = parse_limit(text, terrain.costs, snapshot.job.quality)
        except InputError:  # of a newer server
            continue
        if limit.name in terrain.costs.measures and not limit.lower:
            bounds[limit.name] = min(float(limit.bound), bounds.get(limit.name, float("inf")))
    return bounds


def rivals_of(snapshot: Snapshot) -> dict[str, float]:
    """The best quality of each kind of baseline within the limits, by its name; what is not measured yet is missing."""
    found: dict[str, tuple[float, str]] = {}
    for point in snapshot.whole:
        if point.origin in ("uniform", "additive", "seed", "random") and point.feasible:
            label = f"{snapshot.uniform.get(point.trial, 'one level')} everywhere" if point.origin == "uniform" else ROLES[point.origin]
            found[point.origin] = min(found.get(point.origin, (float("inf"), "")), (point.y, label))
    return {label: value for value, label in found.values()}


def verdict(snapshot: Snapshot) -> list[tuple[str, float]]:
    """How what was found stands beside the best baseline within the limits, and the cheapest uniform level that costs no less.

    Returns:
        The name of each, and the share of its loss that is avoided: negative where it is better than what was found.
    """
    found = next((guest for guest in guests_of(snapshot) if guest.role == "found"), None)
    if found is None or not snapshot.front.feasible:
        return []
    rivals = rivals_of(snapshot)
    against = dict(sorted(rivals.items(), key=lambda item: item[1])[:1])
    uniform = [guest for guest in guests_of(snapshot) if guest.role == "uniform" and guest.cost >= found.cost]
    for level in sorted(uniform, key=lambda guest: guest.cost)[:1]:
        against.setdefault(f"{level.label} everywhere", level.quality)
    shares = {name: 1 - found.quality / quality for name, quality in against.items() if quality > 0}
    return [(name if name.endswith("everywhere") else f"the {name}", share) for name, share in shares.items()]


def bests_over(snapshot: Snapshot, over: str) -> tuple[list[Step], str]:
    """The best within the limits after each trial or, over `time`, by the time since the job began; and the unit of that."""
    series, unit = _series(snapshot, over)
    return bests_of([(at, point.y) for at, point in series if point.feasible]), unit


def dominated_over(snapshot: Snapshot, over: str) -> tuple[list[Step], str]:
    """The same of the share of the picture that the front dominates."""
    series, unit = _series(snapshot, over)
    return steps_of([(at, point.x, point.y) for at, point in series], linear=snapshot.own), unit


def is_open(job: Any) -> bool:
    """Whether it may still find something."""
    return job.state in ("pending", "running", "paused")


def _series(snapshot: Snapshot, over: str) -> tuple[list[tuple[float, Any]], str]:
    points = [point for point in snapshot.whole if point.origin != "dense"]
    if over != "time":
        return [(point.trial, point) for point in points], "trial"
    timed = sorted(((point.seconds, point) for point in points if point.seconds is not None), key=lambda pair: pair[0])
    longest = timed[-1][0] if timed else 0.0
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    size, unit = next((size, unit) for size, unit in units if longest >= 2 * size or size == 1.0)
    return [(at / size, point) for at, point in timed], unit


def _label(snapshot: Snapshot, row: Mapping[str, Any]) -> str:
    if row["role"] == "dense":
        return "reference" if snapshot.own else "dense"
    return str(row["label"] or row["role"])
