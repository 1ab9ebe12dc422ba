"""Exact integer book-keeping of a configuration's costs against limits, and the repair of one that breaks them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoeff.search.allocators.dp import Allocator, integer_costs
from autoeff.search.limits import Limit
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import SearchSpace

__all__ = ["Ledger"]

Integers = NDArray[np.int64]


class Ledger:
    """What every level costs, and what the limits leave.

    Attributes:
        space: The decisions.
        costs: Change against dense, [limits, decisions, levels] in coprime integers; padded with zeros.
        capacity: Largest total change that each limit allows, [limits].
    """

    def __init__(self, space: SearchSpace, cost_model: CostModel, limits: Sequence[Limit]) -> None:
        self.space = space
        self._allocator = Allocator(space, cost_model, limits)
        widest = max(len(d.levels) for d in space.decisions)
        rows, capacity = [], []
        for limit in limits:
            if limit.name not in cost_model.measures:
                continue
            costs, unit = integer_costs(space, cost_model, limit.name)
            if unit == 0:  # no level changes this measure, so nothing here can keep or break the limit
                continue
            rows.append([list(row) + [0] * (widest - len(row)) for row in costs])
            capacity.append((limit.bound - cost_model.dense(limit.name)) // unit)
        self.costs: Integers = np.array(rows, np.int64).reshape(len(rows), len(space.decisions), widest)
        self.capacity: Integers = np.array(capacity, np.int64)
        self._all = np.arange(len(space.decisions))

    def slack(self, indices: Sequence[int]) -> Integers:
        """What the limits leave, [limits]; negative where one is broken."""
        active = np.array(self.space.active(indices))
        left: Integers = self.capacity - (self.costs[:, self._all, np.asarray(indices)] * active).sum(1)
        return left

    def feasible(self, indices: Sequence[int]) -> bool:
        return bool((self.slack(indices) >= 0).all())

    def repaired(self, indices: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """A configuration within the limits: random decisions go down one level until all limits are kept; normalised.

        Raises:
            ValueError: No configuration keeps the limits.
        """
        found = list(indices)
        slack = self.slack(found)
        movable = [i for i, d in enumerate(self.space.decisions) if found[i] + 1 < len(d.levels)]
        while (slack < 0).any():
            if not movable:
                return self._least_harm()
            place = rng.randrange(len(movable))
            i = movable[place]
            found[i] += 1
            if found[i] + 1 == len(self.space.decisions[i].levels):
                movable[place] = movable[-1]
                movable.pop()
            slack = self._after(found, i, found[i] - 1, slack)
        return self.space.normalised(found)

    def filled(self, indices: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """The same configuration with random decisions raised, one level at a time, until nothing more fits."""
        found = list(indices)
        slack = self.slack(found)
        open_ = list(range(len(found)))
        while open_:
            rng.shuffle(open_)
            fitting = []
            for i in open_:
                if found[i] == 0 or not self._on(found, i):
                    continue
                found[i] -= 1
                after = self._after(found, i, found[i] + 1, slack)
                if (after >= 0).all():
                    slack = after
                    fitting.append(i)
                else:
                    found[i] += 1
            open_ = fitting
        return self.space.normalised(found)

    def _after(self, indices: Sequence[int], i: int, before: int, slack: Integers) -> Integers:
        """The slack once decision `i` went from level `before` to that of `indices`."""
        if self.space.children[i]:
            return self.slack(indices)
        return slack + self.costs[:, i, before] - self.costs[:, i, indices[i]] if self._on(indices, i) else slack

    def _on(self, indices: Sequence[int], i: int) -> bool:
        parent = self.space.decisions[i].parent
        while parent is not None:
            if indices[parent] in self.space.decisions[parent].silencing:
                return False
            parent = self.space.decisions[parent].parent
        return True

    def _least_harm(self) -> tuple[int, ...]:
        """Any configuration within the limits, where single steps down led to none."""
        found = self._allocator.solve([[0.0] * len(d.levels) for d in self.space.decisions])
        if found is None:
            raise ValueError("no configuration of the space keeps the limits")
        return found
