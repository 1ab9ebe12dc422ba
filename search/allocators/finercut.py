"""FinerCut: sublayers are left out one by one, each time the one that the model then misses least."""

from __future__ import annotations

from math import inf
from typing import ClassVar

from autoeff.search.allocators.dp import Allocator
from autoeff.search.allocators.llm_drop import around
from autoeff.search.seed import Given, Seed, Steps
from autoeff.spaces.space import SearchSpace

__all__ = ["FinerCut"]


class FinerCut(Seed):
    """Attention and FFN in one list: in each step every sublayer that is left is tried on top of those that are gone.

    The one goes with which the model stays nearest to the dense one, by the search's own measure on a quarter of the text (the source
    takes the norm of the difference of logits). As many go as in the additive optimum, or more where the limits ask for it. Everything
    else is dense meanwhile, and is solved around them in the end. The first step is the damage table; of S sublayers, n of which go,
    the others take (n - 1) (S - n / 2) short evaluations out of the budget, so the rule must be asked for.

    Source: FinerCut, arXiv:2405.18218.
    """

    name: ClassVar[str] = "finercut"
    knob: ClassVar[str] = "skip"
    joins: ClassVar[bool] = False

    def steps(self, given: Given) -> Steps:
        space = given.problem.space
        allocator = Allocator(space, given.problem.cost_model, given.limits)
        base = allocator.solve(given.damage)
        left = self._sublayers(space)
        least = 0 if base is None else sum(base[i] > 0 for i in left)
        if not least:
            return None
        values = [given.damage[i][1] for i in left]
        gone: list[int] = []
        while min(values) < inf:
            gone.append(left.pop(values.index(min(values))))
            if len(gone) >= least and (found := around(given, allocator, gone)) is not None:
                return found
            if not left:
                return None
            values = list((yield [space.normalised([int(j in (*gone, i)) for j in range(len(space.decisions))]) for i in left]))
        return None

    def measures(self, space: SearchSpace) -> int:
        count = len(self._sublayers(space))
        return count * (count - 1) // 2

    def _sublayers(self, space: SearchSpace) -> list[int]:
        return [i for i, decision in enumerate(space.decisions) if decision.knob == self.knob]
