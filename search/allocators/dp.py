"""The exact additive optimum: dynamic programming over the decision forest of a space.

Damage is taken to add up over the active decisions, as costs do exactly. A table over the budget grid holds the least damage
that the decisions seen so far can reach with at most that cost. A level shifts the table by its cost and lifts it by its
damage. A parent splits the table in two: a branch in which it silences its children, which then neither cost nor harm, and a
branch in which they follow; the better one is kept, cell by cell. One table answers every smaller budget too, so the whole
front of cost against damage is read from it.

Source: the dual of L-GreCo's program (arXiv:2210.17357), integer costs as columns, as in SPDY (arXiv:2201.13096).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm, prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import SearchSpace

if TYPE_CHECKING:
    from autoeff.search.limits import Limit  # which needs this module to prove that limits exclude each other

__all__ = ["Allocator", "front", "integer_costs", "solve"]

CELLS = 2**22
WORK = 2**27
"""Most cells of a grid, and most cells x levels (about 1 s). Beyond, costs are rounded up to a coarser unit: limits stay hard."""

Damage = Sequence[Sequence[float]]
Allowed = Sequence[Collection[int]]
Cells = NDArray[np.intp]


def solve(
    space: SearchSpace, damage: Damage, cost_model: CostModel, limits: Sequence[Limit], allowed: Allowed | None = None
) -> tuple[int, ...] | None:
    """The level indices of least total damage within the limits, or None where nothing keeps them.

    Args:
        space: Decisions and their parents.
        damage: For each decision and level; smaller is better, infinity forbids the level.
        cost_model: Costs of the levels.
        limits: Those on quality are ignored.
        allowed: Level indices to choose from for each decision; all by default.
    """
    return Allocator(space, cost_model, limits).solve(damage, allowed)


def front(
    space: SearchSpace, damage: Damage, cost_model: CostModel, limits: Sequence[Limit], measure: str, points: int
) -> list[tuple[int, ...]]:
    """The lower front of total damage against `measure` within the limits, by falling cost.

    Args:
        space: Decisions and their parents.
        damage: For each decision and level; smaller is better, infinity forbids the level.
        cost_model: Costs of the levels.
        limits: Those on quality are ignored.
        measure: A cost measure.
        points: At most so many, spread evenly over the cost with both ends kept.
    """
    return Allocator(space, cost_model, limits, measure).front(damage, points)


class Allocator:
    """The budget grid of a space under limits; made once, it solves any number of damage tables.

    Measures that are affine images of one another (`linear_bytes`, `weight_bytes`, `avg_bits`) share an axis.
    """

    def __init__(
        self, space: SearchSpace, cost_model: CostModel, limits: Sequence[Limit], measure: str | None = None, *, work: int = WORK
    ) -> None:
        self.space = space
        self._work = work
        self._fixed_costs_fit = True
        self._axes: dict[tuple[tuple[int, ...], ...], int | None] = {}  # cost of each level against dense -> the most in total
        if measure is not None:
            self._axes[integer_costs(space, cost_model, measure)[0]] = None
        for limit in limits:
            if limit.name not in cost_model.measures:
                continue
            costs, unit = integer_costs(space, cost_model, limit.name)
            room = limit.bound - cost_model.dense(limit.name)
            if unit == 0:  # no level changes this measure
                self._fixed_costs_fit &= room >= 0
                continue
            known = self._axes.get(costs)
            self._axes[costs] = room // unit if known is None else min(known, room // unit)

    @property
    def exact(self) -> bool:
        """Whether the whole space fits on the grid without rounding costs."""
        return all(axis.unit == 1 for axis in self._grid(self._levels(None)) or ())

    def solve(self, damage: Damage, allowed: Allowed | None = None) -> tuple[int, ...] | None:
        """As the function `solve`."""
        if (table := self._table(damage, allowed)) is None or np.isinf(table.values.flat[-1]):
            return None
        return table.choices(np.array([table.values.size - 1]))[0]

    def front(self, damage: Damage, points: int) -> list[tuple[int, ...]]:
        """As the function `front`, for the measure given to the constructor."""
        if (table := self._table(damage, None)) is None:
            return []
        values = table.values.reshape(len(table.values), -1)[:, -1]  # all other axes at their limits
        steps = np.flatnonzero(values < np.concatenate([[np.inf], values[:-1]]))  # where one unit less would harm more
        if steps.size > points:
            even = np.linspace(steps[-1], steps[0], points)
            steps = steps[np.unique(np.abs(steps[:, None] - even).argmin(0))]
        stride = table.values.size // len(values)
        return table.choices(steps[::-1] * stride + stride - 1)

    def _levels(self, allowed: Allowed | None) -> list[list[int]]:
        return [sorted(a) for a in allowed] if allowed is not None else [list(range(len(d.levels))) for d in self.space.decisions]

    def _grid(self, levels: list[list[int]]) -> list[_Axis] | None:
        """The axes for these levels, or None where an axis alone proves that a limit cannot be kept."""
        axes = [_shifted(self.space, costs, capacity, levels) for costs, capacity in self._axes.items()]
        if not self._fixed_costs_fit or any(axis.capacity < 0 for axis in axes):
            return None
        room = min(CELLS, self._work // sum(map(len, levels)))
        for left, axis in zip(range(len(axes), 0, -1), sorted(axes, key=lambda a: a.capacity), strict=True):
            axis.unit = -(-(axis.capacity + 1) // max(2, int(room ** (1 / left))))
            room = max(1, room // axis.cells)
        return axes

    def _table(self, damage: Damage, allowed: Allowed | None) -> _Table | None:
        levels = self._levels(allowed)
        axes = self._grid(levels)
        return None if axes is None else _Table(self.space, damage, levels, axes)


@dataclass
class _Axis:
    """One axis of the grid, counted from the least reachable cost.

    Attributes:
        costs: What each level adds, at least 0: the least of its subtree is taken off, that of its followers added.
        capacity: Largest total; negative where the limit cannot be kept.
        unit: Cost of one cell.
    """

    costs: list[list[int]]
    capacity: int
    unit: int = 1

    @property
    def cells(self) -> int:
        return self.capacity // self.unit + 1

    def shifts(self) -> list[list[int]]:
        """Cells by which each level moves the table; rounded up, so that limits stay hard."""
        return self.costs if self.unit == 1 else [[-(-cost // self.unit) for cost in row] for row in self.costs]


class _Table:
    """The filled table of one damage table, and the choices that lead to its cells."""

    def __init__(self, space: SearchSpace, damage: Damage, levels: list[list[int]], axes: list[_Axis]) -> None:
        self._space, self._damage, self._levels = space, damage, levels
        self._shape = tuple(axis.cells for axis in axes) or (1,)
        self._shifts = [axis.shifts() for axis in axes]
        self._index_type = np.min_scalar_type(max(len(d.levels) for d in space.decisions))
        self._chosen: dict[tuple[int, bool], NDArray[np.unsignedinteger]] = {}  # (decision, silencing) -> level by cell
        self._silent: dict[int, NDArray[np.bool_]] = {}
        self.values = np.zeros(self._shape)
        for i in space.roots:
            self.values = self._after(i, self.values)

    def _after(self, i: int, before: NDArray[np.float64]) -> NDArray[np.float64]:
        silencing = self._space.decisions[i].silencing if self._space.children[i] else frozenset()
        follow = self._choose(i, before, False, [level for level in self._levels[i] if level not in silencing])
        for child in self._space.children[i]:
            follow = self._after(child, follow)
        if not silencing:
            return follow
        alone = self._choose(i, before, True, [level for level in self._levels[i] if level in silencing])
        self._silent[i] = (alone < follow).ravel()
        return np.minimum(alone, follow)

    def _choose(self, i: int, before: NDArray[np.float64], silencing: bool, levels: list[int]) -> NDArray[np.float64]:
        best = np.full(self._shape, np.inf)
        chosen = np.zeros(self._shape, self._index_type)
        for level in levels:
            shifts = [shifts[i][level] for shifts in self._shifts] or [0]
            if any(shift >= size for shift, size in zip(shifts, self._shape, strict=True)):
                continue
            to = tuple(slice(shift, None) for shift in shifts)
            source = tuple(slice(0, size - shift) for shift, size in zip(shifts, self._shape, strict=True))
            candidate = before[source] + self._damage[i][level]
            better = candidate < best[to]
            np.copyto(best[to], candidate, where=better)
            np.copyto(chosen[to], level, where=better, casting="unsafe")
        self._chosen[i, silencing] = chosen.ravel()
        return best

    def choices(self, cells: Cells) -> list[tuple[int, ...]]:
        """Level indices behind flat cells; silenced decisions are at their first level."""
        found = np.zeros((len(cells), len(self._space.decisions)), np.intp)
        at = cells.copy()
        everyone = np.arange(len(cells))
        for i in reversed(self._space.roots):
            self._back(i, at, everyone, found)
        return [tuple(row) for row in found.tolist()]

    def _back(self, i: int, at: Cells, rows: Cells, found: NDArray[np.intp]) -> None:
        """Walks `rows` back over decision `i` and what follows it: writes their levels, takes their cost off `at`."""
        silent = self._silent[i][at[rows]] if i in self._silent else np.zeros(len(rows), bool)
        for silencing, part in ((True, rows[silent]), (False, rows[~silent])):
            if part.size == 0:
                continue
            if not silencing:
                for child in reversed(self._space.children[i]):
                    self._back(child, at, part, found)
            level = self._chosen[i, silencing][at[part]]
            found[part, i] = level
            at[part] -= self._jump(i)[level]

    def _jump(self, i: int) -> Cells:
        """How far each level of a decision moves a flat cell."""
        jump = np.zeros(len(self._space.decisions[i].levels), np.intp)
        for k, shifts in enumerate(self._shifts):
            jump += np.array(shifts[i], np.intp) * prod(self._shape[k + 1 :])
        return jump


def integer_costs(space: SearchSpace, cost_model: CostModel, name: str) -> tuple[tuple[tuple[int, ...], ...], Fraction]:
    """The costs of all levels against dense as coprime integers, and the unit they count; 0 where all are zero."""
    form = cost_model.measures[name]
    costs = [[form.change(cost) for cost in d.costs] for d in space.decisions]
    denominator = lcm(*(c.denominator for row in costs for c in row))
    factor = gcd(*(int(c * denominator) for row in costs for c in row))
    unit = Fraction(factor, denominator)
    return tuple(tuple(int(c / unit) if factor else 0 for c in row) for row in costs), unit


def _shifted(space: SearchSpace, costs: Sequence[Sequence[int]], capacity: int | None, levels: list[list[int]]) -> _Axis:
    count = len(space.decisions)
    least, most = [0] * count, [0] * count
    shifted: list[list[int]] = [[]] * count
    for i in reversed(range(count)):  # children come after their parents
        low, high = sum(least[c] for c in space.children[i]), sum(most[c] for c in space.children[i])
        silencing = space.decisions[i].silencing
        lows = [cost + (0 if level in silencing else low) for level, cost in enumerate(costs[i])]
        least[i] = min(lows[level] for level in levels[i])
        most[i] = max(costs[i][level] + (0 if level in silencing else high) for level in levels[i])
        shifted[i] = [cost - least[i] for cost in lows]
    floor, ceiling = sum(least[i] for i in space.roots), sum(most[i] for i in space.roots)
    return _Axis(shifted, (ceiling if capacity is None else min(capacity, ceiling)) - floor)
