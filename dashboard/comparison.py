"""Jobs beside each other: whether their values mean the same, what each found within common budgets, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autoeff.dashboard.fetch import Snapshot
from autoeff.dashboard.outline import guests_of
from autoeff.search.pareto import non_dominated
from autoeff.spaces.measurements import described

__all__ = ["best_within", "budgets_of", "front_of", "names_of", "settings_of", "why_not"]


def why_not(shown: Sequence[Snapshot]) -> str | None:
    """Why values of these jobs do not compare; None where they do."""
    first = shown[0]
    for other in shown[1:]:
        names = f"{first.job.job} and {other.job.job}"
        if first.own != other.own:
            return f"{names} do not compare: one searched a model and the other its own code."
        if first.job.quality != other.job.quality:
            return f"{names} do not compare: their quality is {first.job.quality} and {other.job.quality}."
        if first.own:
            if first.job.model != other.job.model:
                return f"{names} do not compare: they searched {first.job.model} and {other.job.model}."
            continue
        a, b = first.job.preflight, other.job.preflight
        if a["model"]["digest"] != b["model"]["digest"]:
            return f"{names} do not compare: their models differ ({first.job.model} and {other.job.model}, by the digests of their files)."
        if a["text"]["search"]["digest"] != b["text"]["search"]["digest"]:
            return f"{names} do not compare: their search texts differ."
        if first.job.judged_cost != other.job.judged_cost and not _shared(first, other):
            return f"{names} do not compare: they have no cost in common."
    return None


def names_of(shown: Sequence[Snapshot]) -> dict[str, str]:
    """A short name for each job: its sampler and limits where these tell them apart, and its id."""
    return {
        s.job.job: f"{s.job.job[:6]} · {s.job.spec.get('sampler', 'own code')} · {', '.join(s.job.limits) or 'no limits'}" for s in shown
    }


def front_of(snapshot: Snapshot) -> list[tuple[float, float, int]]:
    """(cost, quality, trial) of what no other trial of the picture beats in both, by rising cost; limits are left aside."""
    points = snapshot.whole
    chosen = [points[i] for i in non_dominated([(point.x, point.y) for point in points])]
    return [(point.x, point.y, point.trial) for point in chosen]


def budgets_of(shown: Sequence[Snapshot]) -> list[tuple[str, float]]:
    """Costs at which jobs are compared, by falling cost: those of the uniform levels of the first job that has any."""
    for snapshot in shown:
        uniform = {guest.label: guest.cost for guest in guests_of(snapshot) if guest.role == "uniform"}
        if uniform:
            return sorted(uniform.items(), key=lambda item: -item[1])
    return []


def best_within(front: Sequence[tuple[float, float, int]], bound: float) -> tuple[float, float, int] | None:
    """The best of a front that costs no more; None where everything costs more."""
    return min((point for point in front if point[0] <= bound), key=lambda point: point[1], default=None)


def settings_of(shown: Sequence[Snapshot]) -> dict[str, list[Any]]:
    """The fields of the jobs that differ, and the facts of the machines on which values depend."""
    facts = [dict(_flat(s.job.spec)) | {name: s.job.preflight.get(name) for name in ("hardware", "torch")} for s in shown]
    names = dict.fromkeys(name for fact in facts for name in fact)
    return {name: [fact.get(name) for fact in facts] for name in names if any(fact.get(name) != facts[0].get(name) for fact in facts)}


def _shared(first: Snapshot, other: Snapshot) -> bool:
    return any(name in first.job.columns and described(name).kind == "cost" for name in other.job.columns)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
