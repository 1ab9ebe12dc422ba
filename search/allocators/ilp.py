"""The additive optimum as an integer linear program: exact where the grid of the dynamic program rounds costs."""

from __future__ import annotations

from math import inf
from typing import ClassVar

import numpy as np

from autoeff.search.allocators.dp import integer_costs
from autoeff.search.seed import Formula, Given
from autoeff.spaces.space import Context

__all__ = ["IntegerProgram"]

_SECONDS = 60.0


class IntegerProgram(Formula):
    """One binary variable for each level of each decision under each branch of its ancestors; every limit is a row.

    A decision takes one level where its parent takes the branch that leads to it, and none elsewhere. Levels of infinite damage are
    left out. Solved by HiGHS; after a minute its best so far is taken.

    Source: HAWQ-V3, arXiv:2011.10680, for bit widths; here over a forest of decisions.
    """

    name: ClassVar[str] = "ilp"
    knob: ClassVar[None] = None
    joins: ClassVar[bool] = False

    def configuration(self, given: Given) -> tuple[int, ...] | None:
        from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]  # it takes longer to import than to list rules
        from scipy.sparse import coo_array  # type: ignore[import-untyped]

        space, cost_model = given.problem.space, given.problem.cost_model
        place: dict[tuple[int, Context, int], int] = {}
        for i, decision in enumerate(space.decisions):
            for context, costs in decision.costs.items():
                place |= {(i, context, level): len(place) + level for level in range(len(costs))}
        damage = np.array([given.damage[i][level] for i, _, level in place])
        rows: list[tuple[dict[int, float], float, float]] = []  # coefficients, least and most
        for i, decision in enumerate(space.decisions):
            for context in decision.costs:
                taken = {place[i, context, level]: 1.0 for level in range(len(decision.levels))}
                if decision.parent is None:
                    rows.append((taken, 1.0, 1.0))
                    continue
                branches = space.decisions[decision.parent].branches
                above = {place[decision.parent, context[:-1], k]: -1.0 for k, branch in enumerate(branches) if branch == context[-1]}
                rows.append((taken | above, 0.0, 0.0))
        for limit in given.limits:
            whole, unit = integer_costs(space, cost_model, limit.name)
            room = limit.bound - cost_model.dense(limit.name)
            if unit == 0:
                if room < 0:
                    return None
                continue
            rows.append(({place[i, c, k]: float(whole[i][c][k]) for i, c, k in place if whole[i][c][k]}, -inf, float(room // unit)))
        entries = [(value, r, column) for r, (row, _, _) in enumerate(rows) for column, value in row.items()]
        values, numbers, columns = zip(*entries, strict=True)
        matrix = coo_array((values, (numbers, columns)), shape=(len(rows), len(place))).tocsr()
        found = milp(
            np.where(np.isinf(damage), 0.0, damage),
            integrality=np.ones(len(place)),
            bounds=Bounds(0, np.where(np.isinf(damage), 0.0, 1.0)),
            constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
            options={"time_limit": _SECONDS, "mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        indices = [0] * len(space.decisions)
        for (i, _, level), value in zip(place, found.x, strict=True):
            if value > 0.5:
                indices[i] = level
        chosen = space.normalised(indices)
        within = all(limit.met(cost_model.exact(limit.name, chosen)) for limit in given.limits)
        return chosen if within else None  # a solver works in floats
