"""The Pareto front: what no other point beats in every objective."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["non_dominated"]


def non_dominated(values: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that no other point dominates, by rising first objective.

    A point dominates another if it is nowhere worse and somewhere better. Of equal points the first stays. Points with NaN or
    infinity are left out. In one or two objectives the time is that of sorting.

    Args:
        values: Points in objectives that are all minimised, [points, objectives].
    """
    finite = [i for i, point in enumerate(values) if all(abs(x) < float("inf") for x in point)]
    order = sorted(finite, key=lambda i: (*values[i], i))
    front: list[int] = []
    for i in order:  # whatever dominates a point, or equals it, stands before it
        rivals = front[-1:] if len(values[i]) <= 2 else front  # in two objectives the last one has the least second
        if not any(all(a <= b for a, b in zip(values[rival], values[i], strict=True)) for rival in rivals):
            front.append(i)
    return front
