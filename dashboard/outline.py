"""From a snapshot of a job to what its page says and draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from autoeff.dashboard.fetch import OPEN, Snapshot, Terrain
from autoeff.dashboard.figures.front import Dot, Guest
from autoeff.dashboard.figures.progress import Step, steps_of
from autoeff.dashboard.words import moment
from autoeff.errors import InputError
from autoeff.search.limits import parse_limit

__all__ = ["Pace", "dots_of", "front_of", "guests_of", "is_open", "limit_of", "pace_of", "steps_by_time", "steps_by_trial", "verdict"]


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


def limit_of(snapshot: Snapshot, terrain: Terrain | None) -> float | None:
    """The tightest of the job's limits on the cost that is drawn."""
    if terrain is None:
        return None
    bounds = []
    for text in snapshot.job.limits:
        try:
            limit = parse_limit(text, terrain.costs, snapshot.job.quality)
        except InputError:  # of a newer server
            continue
        if limit.name == snapshot.job.judged_cost and not limit.lower:
            bounds.append(float(limit.bound))
    return min(bounds, default=None)


def steps_by_trial(snapshot: Snapshot) -> list[Step]:
    """The dominated share over the number of trials."""
    return steps_of([(point.trial, point.x, point.y) for point in snapshot.whole if point.origin != "dense"], linear=snapshot.own)


def steps_by_time(snapshot: Snapshot) -> tuple[list[Step], str]:
    """The same over the time since the job began, and the unit of that time."""
    timed = sorted((point.seconds, point.x, point.y) for point in snapshot.whole if point.origin != "dense" and point.seconds is not None)
    longest = timed[-1][0] if timed else 0.0
    size, unit = next(
        (size, unit)
        for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if longest >= 2 * size or size == 1.0
    )
    return steps_of([(at / size, x, y) for at, x, y in timed], linear=snapshot.own), unit


def verdict(snapshot: Snapshot) -> tuple[str, Mapping[str, float]] | None:
    """How the found configuration stands beside the cheapest uniform level that costs no less; None before there is something to say.

    Returns:
        The label of that level, and the shares that are saved: `quality` and `cost`.
    """
    guests = guests_of(snapshot)
    found = next((guest for guest in guests if guest.role == "found"), None)
    if found is None:
        return None
    uniform = [guest for guest in guests if guest.role == "uniform"]
    above = min((g for g in uniform if g.cost >= found.cost and g.quality > found.quality), key=lambda g: g.cost, default=None)
    if above is None or above.quality <= 0 or above.cost <= 0:
        return None
    return above.label, {"quality": 1 - found.quality / above.quality, "cost": 1 - found.cost / above.cost}


def is_open(job: Any) -> bool:
    """Whether it may still find something."""
    return job.state in OPEN


def _label(snapshot: Snapshot, row: Mapping[str, Any]) -> str:
    if row["role"] == "dense":
        return "reference" if snapshot.own else "dense"
    return str(row["label"] or row["role"])
