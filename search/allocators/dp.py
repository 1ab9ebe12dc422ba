"""The exact additive optimum: dynamic programming over the decision forest of a space.

Damage is taken to add up over the active decisions, as costs do exactly. A table over the budget grid holds the least damage
that the decisions seen so far can reach with at most that cost. A level shifts the table by its cost and lifts it by its
damage. A parent splits the table into its branches: in each one the children follow at the costs that they have there, or are
silenced and neither cost nor harm; the best branch is kept, cell by cell. One table answers every smaller budget too, so the
whole front of cost against damage is read from it.

Source: the dual of L-GreCo's program (arXiv:2210.17357), integer costs as columns, as in SPDY (arXiv:2201.13096).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm, prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Context, SearchSpace

if TYPE_CHECKING:
    from autoeff.search.limits import Limit  # which needs this module to prove that limits exclude each other

__all__ = ["Allocator", "front", "integer_costs", "solve"]

CELLS = 2**22
WORK = 2**27
"""Most cells of a grid, and most cells x levels (about 1 s). Beyond, costs are rounded to a coarser unit."""

Damage = Sequence[Sequence[float]]
Allowed = Sequence[Collection[int]]
Cells = NDArray[np.intp]
Rows = Sequence[Mapping[Context, Sequence[int]]]
"""By decision and context: an integer for each level."""
Rounding = Callable[[int, int], int]


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
        self._axes: list[tuple[Rows, int | None]] = []  # costs, and the most that their sum may be
        if measure is not None:
            self._axes.append((integer_costs(space, cost_model, measure)[0], None))
        for limit in limits:
            if limit.name not in cost_model.measures:
                continue
            costs, unit = integer_costs(space, cost_model, limit.name)
            room = limit.bound - cost_model.dense(limit.name)
            if unit == 0:  # no level changes this measure
                self._fixed_costs_fit &= room >= 0
                continue
            most = room // unit
            for k, (known, capacity) in enumerate(self._axes):
                if known == costs:
                    self._axes[k] = (known, most if capacity is None else min(capacity, most))
                    break
            else:
                self._axes.append((costs, most))

    @property
    def exact(self) -> bool:
        """Whether the whole space fits on the grid without rounding costs."""
        return all(axis.unit == 1 for axis in self._grid(self._levels(None)) or ())

    def solve(self, damage: Damage, allowed: Allowed | None = None) -> tuple[int, ...] | None:
        """As the function `solve`.

        Limits stay hard where costs were rounded: the errors of hundreds of decisions nearly cancel, and what then exceeds a limit
        by a few cells is read a few cells lower. If that leads nowhere, costs are rounded up.
        """
        if (table := self._table(damage, allowed, _nearest)) is None:
            return None
        back = 0
        while back < max(table.values.shape) and (found := table.at(back)) is not None:
            if self._keeps(found):
                return found
            back = 2 * back or 1
        rounded_up = self._table(damage, allowed, _up)
        return None if rounded_up is None else rounded_up.at(0)

    def front(self, damage: Damage, points: int) -> list[tuple[int, ...]]:
        """As the function `front`, for the measure given to the constructor."""
        if (table := self._table(damage, None, _nearest)) is None:
            return []
        values = table.values.reshape(len(table.values), -1)[:, -1]  # all other axes at their limits
        steps = np.flatnonzero(values < np.concatenate([[np.inf], values[:-1]]))  # where one unit less would harm more
        if steps.size > points:
            even = np.linspace(steps[-1], steps[0], points)
            steps = steps[np.unique(np.abs(steps[:, None] - even).argmin(0))]
        stride = table.values.size // len(values)
        return [found for found in table.choices(steps[::-1] * stride + stride - 1) if self._keeps(found)]

    def _keeps(self, indices: Sequence[int]) -> bool:
        """Whether a configuration is within every limit, exactly."""
        contexts = self.space.contexts(indices)
        return all(
            capacity is None or sum(rows[c][i] for rows, c, i in zip(costs, contexts, indices, strict=True) if c is not None) <= capacity
            for costs, capacity in self._axes
        )

    def _levels(self, allowed: Allowed | None) -> list[list[int]]:
        return [sorted(a) for a in allowed] if allowed is not None else [list(range(len(d.levels))) for d in self.space.decisions]

    def _grid(self, levels: list[list[int]]) -> list[_Axis] | None:
        """The axes for these levels, or None where an axis alone proves that a limit cannot be kept."""
        axes = [_shifted(self.space, costs, capacity, levels) for costs, capacity in self._axes]
        if not self._fixed_costs_fit or any(axis.capacity < 0 for axis in axes):
            return None
        steps = max((sum(len(levels[i]) * len(rows) for i, rows in enumerate(axis.costs)) for axis in axes), default=1)
        room = min(CELLS, self._work // steps)
        for left, axis in zip(range(len(axes), 0, -1), sorted(axes, key=lambda a: a.capacity), strict=True):
            axis.unit = -(-(axis.capacity + 1) // max(2, int(room ** (1 / left))))
            room = max(1, room // axis.cells)
        return axes

    def _table(self, damage: Damage, allowed: Allowed | None, rounding: Rounding) -> _Table | None:
        levels = self._levels(allowed)
        axes = self._grid(levels)
        return None if axes is None else _Table(self.space, damage, levels, axes, rounding)


@dataclass
class _Axis:
    """One axis of the grid, counted from the least reachable cost.

    Attributes:
        costs: What each level adds, at least 0: the least of its subtree is taken off, that of its followers added. Only contexts
            that the allowed levels lead to.
        capacity: Largest total; negative where the limit cannot be kept.
        unit: Cost of one cell.
    """

    costs: Rows
    capacity: int
    unit: int = 1

    @property
    def cells(self) -> int:
        return self.capacity // self.unit + 1

    def shifts(self, rounding: Rounding) -> Rows:
        """Cells by which each level moves the table."""
        if self.unit == 1:
            return self.costs
        return [{context: [rounding(cost, self.unit) for cost in row] for context, row in rows.items()} for rows in self.costs]


class _Table:
    """The filled table of one damage table, and the choices that lead to its cells."""

    def __init__(self, space: SearchSpace, damage: Damage, levels: list[list[int]], axes: list[_Axis], rounding: Rounding) -> None:
        self._space, self._damage, self._levels = space, damage, levels
        self._shape = tuple(axis.cells for axis in axes) or (1,)
        self._shifts = [axis.shifts(rounding) for axis in axes]
        self._index_type = np.min_scalar_type(max(len(d.levels) for d in space.decisions))
        self._chosen: dict[tuple[int, Context, int | None], NDArray[np.unsignedinteger]] = {}  # by branch: level by cell
        self._taken: dict[tuple[int, Context], NDArray[np.unsignedinteger]] = {}  # number of the branch by cell
        self._branches = [self._by_branch(i) for i in range(len(levels))]
        self.values = np.zeros(self._shape)
        for i in space.roots:
            self.values = self._after(i, self.values, ())

    def _by_branch(self, i: int) -> dict[int | None, list[int]]:
        branches = self._space.decisions[i].branches if self._space.children[i] else (0,) * len(self._space.decisions[i].levels)
        found: dict[int | None, list[int]] = {}
        for level in self._levels[i]:
            found.setdefault(branches[level], []).append(level)
        return found

    def _after(self, i: int, before: NDArray[np.float64], context: Context) -> NDArray[np.float64]:
        best: NDArray[np.float64] | None = None
        for number, (branch, levels) in enumerate(self._branches[i].items()):
            values = self._choose(i, before, context, branch, levels)
            for child in self._space.children[i] if branch is not None else ():
                assert branch is not None
                values = self._after(child, values, (*context, branch))
            if best is None:
                best = values
                continue
            taken = self._taken.setdefault((i, context), np.zeros(values.size, np.uint8))
            taken[(values < best).ravel()] = number
            best = np.minimum(best, values)
        assert best is not None
        return best

    def _choose(self, i: int, before: NDArray[np.float64], context: Context, branch: int | None, levels: list[int]) -> NDArray[np.float64]:
        best = np.full(self._shape, np.inf)
        chosen = np.zeros(self._shape, self._index_type)
        for level in levels:
            shifts = [shifts[i][context][level] for shifts in self._shifts] or [0]
            if any(shift >= size for shift, size in zip(shifts, self._shape, strict=True)):
                continue
            to = tuple(slice(shift, None) for shift in shifts)
            source = tuple(slice(0, size - shift) for shift, size in zip(shifts, self._shape, strict=True))
            candidate = before[source] + self._damage[i][level]
            better = candidate < best[to]
            np.copyto(best[to], candidate, where=better)
            np.copyto(chosen[to], level, where=better, casting="unsafe")
        self._chosen[i, context, branch] = chosen.ravel()
        return best

    def at(self, back: int) -> tuple[int, ...] | None:
        """The level indices `back` cells before the end of every axis; None where every choice is forbidden."""
        cell = tuple(max(0, size - 1 - back) for size in self._shape)
        flat = int(np.ravel_multi_index(cell, self._shape))
        return None if np.isinf(self.values.flat[flat]) else self.choices(np.array([flat]))[0]

    def choices(self, cells: Cells) -> list[tuple[int, ...]]:
        """Level indices behind flat cells; silenced decisions are at their first level."""
        found = np.zeros((len(cells), len(self._space.decisions)), np.intp)
        at = cells.copy()
        everyone = np.arange(len(cells))
        for i in reversed(self._space.roots):
            self._back(i, at, everyone, found, ())
        return [tuple(row) for row in found.tolist()]

    def _back(self, i: int, at: Cells, rows: Cells, found: NDArray[np.intp], context: Context) -> None:
        """Walks `rows` back over decision `i` and what follows it: writes their levels, takes their cost off `at`."""
        taken = self._taken[i, context][at[rows]] if (i, context) in self._taken else np.zeros(len(rows), np.uint8)
        jump = self._jump(i, context)
        for number, branch in enumerate(self._branches[i]):
            part = rows[taken == number]
            if part.size == 0:
                continue
            for child in reversed(self._space.children[i]) if branch is not None else ():
                assert branch is not None
                self._back(child, at, part, found, (*context, branch))
            level = self._chosen[i, context, branch][at[part]]
            found[part, i] = level
            at[part] -= jump[level]

    def _jump(self, i: int, context: Context) -> Cells:
        """How far each level of a decision moves a flat cell."""
        jump = np.zeros(len(self._space.decisions[i].levels), np.intp)
        for k, shifts in enumerate(self._shifts):
            jump += np.array(shifts[i][context], np.intp) * prod(self._shape[k + 1 :])
        return jump


def integer_costs(space: SearchSpace, cost_model: CostModel, name: str) -> tuple[Rows, Fraction]:
    """The costs of all levels on top of their ancestors as coprime integers, and the unit they count; 0 where all are zero."""
    form = cost_model.measures[name]
    costs = [{context: [form.change(cost) for cost in row] for context, row in d.costs.items()} for d in space.decisions]
    every = [cost for rows in costs for row in rows.values() for cost in row]
    denominator = lcm(*(cost.denominator for cost in every))
    factor = gcd(*(int(cost * denominator) for cost in every))
    unit = Fraction(factor, denominator)
    whole = [{context: tuple(int(c / unit) if factor else 0 for c in row) for context, row in rows.items()} for rows in costs]
    return whole, unit


def _shifted(space: SearchSpace, costs: Rows, capacity: int | None, levels: list[list[int]]) -> _Axis:
    shifted: list[dict[Context, list[int]]] = [{} for _ in space.decisions]

    def span(i: int, context: Context) -> tuple[int, int]:
        """The least and the most that decision `i` and those below it cost."""
        branches, row = space.decisions[i].branches, costs[i][context]
        low: dict[int | None, int] = {None: 0}
        high: dict[int | None, int] = {None: 0}
        for branch in {branches[level] for level in levels[i]}:
            if branch is not None:
                below = [span(child, (*context, branch)) for child in space.children[i]]
                low[branch], high[branch] = sum(least for least, _ in below), sum(most for _, most in below)
        lows = {level: row[level] + low[branches[level]] for level in levels[i]}
        least = min(lows.values())
        shifted[i][context] = [lows.get(level, least) - least for level in range(len(row))]
        return least, max(row[level] + high[branches[level]] for level in levels[i])

    ends = [span(i, ()) for i in space.roots]
    floor, ceiling = sum(least for least, _ in ends), sum(most for _, most in ends)
    return _Axis(shifted, (ceiling if capacity is None else min(capacity, ceiling)) - floor)


def _nearest(cost: int, unit: int) -> int:
    return (2 * cost + unit) // (2 * unit)


def _up(cost: int, unit: int) -> int:
    return -(-cost // unit)
