"""The levels nearest to what a rule wants, within the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoeff.search.allocators.dp import Allocator
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.seed import Given

__all__ = ["nearest"]


def nearest(
    given: Given, base: Sequence[int], wanted: Mapping[int, float], amounts: Mapping[int, Sequence[float]]
) -> tuple[int, ...] | None:
    """Level indices of least squared distance to `wanted` that keep the limits, found exactly; what is then left of the budget is used.

    A level is given back, one after the other, where that loses least by the distance, while the limits allow it.

    Args:
        given: The problem and its limits.
        base: Level indices of every other decision.
        wanted: By decision an amount, such as tokens or a share of zeros.
        amounts: By decision the amount of each level.
    """
    space = given.problem.space
    distance = [[(a - wanted[i]) ** 2 for a in amounts[i]] if i in wanted else [0.0] * len(d.levels) for i, d in enumerate(space.decisions)]
    allowed = [range(len(d.levels)) if i in wanted else [base[i]] for i, d in enumerate(space.decisions)]
    found = Allocator(space, given.problem.cost_model, given.limits).solve(distance, allowed)
    if found is None:
        return None
    ledger = Ledger(space, given.problem.cost_model, given.limits)
    while True:
        raised = [
            (distance[i][found[i] - 1] - distance[i][found[i]], i, space.normalised([*found[:i], found[i] - 1, *found[i + 1 :]]))
            for i in wanted
            if found[i] > 0
        ]
        fitting = [move for move in raised if ledger.feasible(move[2])]
        if not fitting:
            return found
        found = min(fitting)[2]
