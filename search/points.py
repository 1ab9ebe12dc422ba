"""The points of a picture of a job: so many as a picture can show, chosen so that it stays true."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from autoeff.errors import InputError
from autoeff.search.own_job import NUMBER
from autoeff.search.results import evaluation_key
from autoeff.search.standing import Standing
from autoeff.search.storage.records import Job, Origin, State
from autoeff.search.storage.scan import Brief, Scan
from autoeff.search.storage.store import Store
from autoeff.spaces.measurements import MEASURES, Split

__all__ = ["Point", "evenly", "points_of"]

_BASELINES = tuple(origin for origin in get_args(Origin) if origin not in ("searched", "table"))


@dataclass(frozen=True)
class Point:
    """A trial in a picture.

    Attributes:
        windows: Of the search text; fewer than all of them is a cheap fidelity.
        x: Its value on this axis; None where there is none.
        y: As `x`.
        front: Whether it is on the job's front.
        feasible: Whether its costs keep the job's limits.
        seconds: From the job's beginning to the end of its evaluation: 0 for what another job had measured, None before it ended.
    """

    trial: int
    origin: Origin
    state: State
    windows: int
    x: float | None
    y: float | None
    front: bool
    feasible: bool
    seconds: float | None


def points_of(store: Store, job: Job, standing: Standing, x: str, y: str, most: int) -> list[Point]:
    """At most `most` points, by number: the front whole and the baselines whole, and of everything else evenly many over time.

    Where even the front is larger than that, it is thinned too.

    Args:
        store: Holds the job.
        job: The job.
        standing: Its front.
        x: Name of a measurement, or `trial` for the number.
        y: As `x`.
        most: How many points, at least 1.

    Raises:
        InputError: No trial has such a measurement, and it is none that autoeff knows.
    """
    names = {x, y} - {NUMBER}
    scan = Scan(store.database, job.id, names)
    front = _thinned(sorted(standing.front), most)
    chosen = dict.fromkeys(front)
    if len(chosen) < most:
        chosen |= dict.fromkeys(_thinned([n for n in scan.numbers(_BASELINES, most) if n not in chosen], most - len(chosen)))
    chosen |= dict.fromkeys(evenly(job.counts.trials, most - len(chosen)))
    found = [brief for brief in scan.of(list(chosen)) if brief.split == "search"]
    confirmed = _confirmed(scan, job, found, names)
    for name in names - MEASURES.keys():
        if not any(name in brief.values or name in confirmed.get(brief.configuration, {}) for brief in found):
            raise InputError(f"no trial of job {job.id} has a measurement {name!r}; known: {NUMBER}, {', '.join(sorted(MEASURES))}")

    def value(brief: Brief, name: str) -> float | None:
        if name == NUMBER:
            return float(brief.number)
        return brief.values.get(name, confirmed.get(brief.configuration, {}).get(name))

    def since(brief: Brief) -> float | None:
        return None if brief.ended_at is None else max(0.0, (brief.ended_at - job.created_at).total_seconds())

    on_front = set(front)
    return [
        Point(
            one.number, one.origin, one.state, one.windows, value(one, x), value(one, y), one.number in on_front, one.feasible, since(one)
        )
        for one in found
    ]  # fmt: skip


def evenly(total: int, room: int) -> list[int]:
    """At most `room` of the numbers below `total`: one of each of equally long stretches, at a place that is drawn.

    Stretches are powers of two long, and where two become one, one of their numbers stays: as `total` grows, a picture loses points
    and moves none, the last stretch excepted. A drawn place does not fall in step with a sampler that takes turns.
    """
    doublings = 0
    while room > 0 and -(-total >> doublings) > room:
        doublings += 1
    stretches = -(-total >> doublings) if room > 0 else 0
    return [_drawn(i, doublings, total) for i in range(stretches)]


def _drawn(stretch: int, doublings: int, total: int) -> int:
    for level in range(doublings, 0, -1):
        second = (stretch * 0x9E3779B97F4A7C15 + level * 0xC2B2AE3D27D4EB4F) >> 31 & 1
        stretch = 2 * stretch + (second if (2 * stretch + 1) << (level - 1) < total else 0)
    return stretch


def _thinned(numbers: Sequence[int], room: int) -> list[int]:
    """At most `room` of them, evenly."""
    return [numbers[i] for i in evenly(len(numbers), room)]


def _confirmed(scan: Scan, job: Job, found: Iterable[Brief], names: Iterable[str]) -> Mapping[str, Mapping[str, float]]:
    """What is known of configurations from the held-out text alone, by digest."""
    text: Mapping[str, Any] | None = job.preflight.get("text", {}).get("held_out")
    if text is None or all(name in MEASURES and not _held_out(name) for name in names):
        return {}
    split: Split = "held_out"
    digests = dict.fromkeys(brief.configuration for brief in found)
    keys = [evaluation_key(job.setup_digest, digest, split, text["windows"]) for digest in digests]
    return {brief.configuration: brief.values for brief in scan.of_keys(keys)}


def _held_out(name: str) -> bool:
    return name.endswith("_held_out")
