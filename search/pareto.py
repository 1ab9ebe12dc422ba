"""The Pareto front: what no other point beats in every objective. All objectives are minimised."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from math import isfinite

__all__ = ["Archive", "hypervolume", "non_dominated"]

Point = tuple[float, ...]


class Archive:
    """The non-dominated points of those added so far, by rising first objective.

    A point dominates another if it is nowhere worse and somewhere better. Of equal points that with the least key stays, so that it
    does not matter in which order points come. In one or two objectives adding takes a binary search; in more, one pass over the front.
    """

    def __init__(self) -> None:
        self._front: list[tuple[Point, int]] = []

    @property
    def points(self) -> list[Point]:
        return [point for point, _ in self._front]

    @property
    def keys(self) -> list[int]:
        return [key for _, key in self._front]

    def add(self, point: Sequence[float], key: int) -> bool:
        """Whether the point joins the front, from which those that it dominates go; one with NaN or infinity never does.

        Args:
            point: One value per objective, as many as in earlier points.
            key: What `keys` names it by.
        """
        new = tuple(point)
        if not all(map(isfinite, new)):
            return False
        at = bisect_left(self._front, new, key=lambda item: item[0])
        if at < len(self._front) and self._front[at][0] == new:
            if stays := key < self._front[at][1]:
                self._front[at] = (new, key)
            return stays
        # in two objectives the left neighbour has the least second one of all that are no worse in the first
        rivals = self._front[max(0, at - 1) : at + 1] if len(new) <= 2 else self._front
        if any(_covers(point, new) for point, _ in rivals):
            return False
        behind = at
        if len(new) <= 2:
            while behind < len(self._front) and _covers(new, self._front[behind][0]):
                behind += 1
            self._front[at:behind] = [(new, key)]
        else:
            self._front[at:] = [(new, key), *(item for item in self._front[at:] if not _covers(new, item[0]))]
        return True


def non_dominated(values: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that no other point dominates, by rising first objective; see `Archive`.

    Args:
        values: [points, objectives].
    """
    archive = Archive()
    for i, point in enumerate(values):
        archive.add(point, i)
    return archive.keys


def hypervolume(values: Sequence[Sequence[float]], reference: tuple[float, float]) -> float:
    """The area that two objectives dominate up to `reference`; larger is better. Points beyond the reference add nothing.

    Args:
        values: [points, 2].
        reference: The worst value of each objective that counts.
    """
    inside = [point for point in values if point[0] < reference[0] and point[1] < reference[1]]
    front = [tuple(inside[i]) for i in non_dominated(inside)]
    return sum((after[0] - at[0]) * (reference[1] - at[1]) for at, after in pairwise([*front, reference]))


def _covers(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is nowhere worse than `b`."""
    return all(x <= y for x, y in zip(a, b, strict=True))
