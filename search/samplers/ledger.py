"""Exact integer book-keeping of a configuration's costs against limits, and the repair of one that breaks them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoeff.search.allocators.dp import Allocator, integer_costs
from autoeff.search.limits import Limit
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Context, SearchSpace

__all__ = ["Ledger"]

Integers = NDArray[np.int64]


class Ledger:
    """What every level costs, and what the limits leave.

    Attributes:
        space: The decisions.
        capacity: Largest total change that each limit allows, [limits].
    """

    def __init__(self, space: SearchSpace, cost_model: CostModel, limits: Sequence[Limit]) -> None:
        self.space = space
        self._allocator = Allocator(space, cost_model, limits)
        self._widest = max(len(d.levels) for d in space.decisions)
        costs, capacity = [], []
        for limit in limits:
            if limit.name not in cost_model.measures:
                continue
            rows, unit = integer_costs(space, cost_model, limit.name)
            if unit == 0:  # no level changes this measure, so nothing here can keep or break the limit
                continue
            costs.append(rows)
            capacity.append((limit.bound - cost_model.dense(limit.name)) // unit)
        self.capacity: Integers = np.array(capacity, np.int64)
        self._costs = [  # by decision and context: [limits, levels], padded with zeros
            {context: self._padded([rows[i][context] for rows in costs]) for context in d.costs} for i, d in enumerate(space.decisions)
        ]
        self._dense = self._at([(0,) * len(next(iter(d.costs))) for d in space.decisions])
        self._all = np.arange(len(space.decisions))

    def costs(self, indices: Sequence[int]) -> Integers:
        """What every level adds to its ancestors as they are in `indices`, [limits, decisions, levels]; zeros for inert decisions."""
        contexts = self.space.contexts(indices)
        if all(context is not None and not any(context) for context in contexts):
            return self._dense
        return self._at(contexts)

    def slack(self, indices: Sequence[int]) -> Integers:
        """What the limits leave, [limits]; negative where one is broken."""
        left: Integers = self.capacity - self.costs(indices)[:, self._all, np.asarray(indices)].sum(1)
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
                if found[i] == 0 or self.space.context(found, i) is None:
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
        if (context := self.space.context(indices, i)) is None:
            return slack
        costs = self._costs[i][context]
        left: Integers = slack + costs[:, before] - costs[:, indices[i]]
        return left

    def _at(self, contexts: Sequence[Context | None]) -> Integers:
        zeros = np.zeros((len(self.capacity), self._widest), np.int64)
        rows = [zeros if context is None else costs[context] for costs, context in zip(self._costs, contexts, strict=True)]
        return np.stack(rows, 1)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Integers:
        return np.array([[*row, *[0] * (self._widest - len(row))] for row in rows], np.int64).reshape(len(rows), self._widest)

    def _least_harm(self) -> tuple[int, ...]:
        """Any configuration within the limits, where single steps down led to none."""
        found = self._allocator.solve([[0.0] * len(d.levels) for d in self.space.decisions])
        if found is None:
            raise ValueError("no configuration of the space keeps the limits")
        return found
