"""EVA: adapters get as many terms as their inputs have directions that explain much of them."""

from __future__ import annotations

from typing import ClassVar

from autoeff.search.allocators.dp import Allocator
from autoeff.search.allocators.nearest import nearest
from autoeff.search.seed import Formula, Given

__all__ = ["Eva"]


class Eva(Formula):
    """The explained-variance ratios of the inputs of all linears in one list; the rank of a linear is how many of the greatest are its own.

    As many are taken as parameters of the additive optimum allow; everything else is as there. Variances are second moments, not
    centred. Linears of a site are fed the same tensor, so they have one rank anyway.

    Source: EVA, arXiv:2410.07170.
    """

    name: ClassVar[str] = "eva"
    knob: ClassVar[str] = "lora_rank"
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def configuration(self, given: Given) -> tuple[int, ...] | None:
        space = given.problem.space
        base = Allocator(space, given.problem.cost_model, given.limits).solve(given.damage)
        if base is None:
            return None
        decided = {i: [int(level) for level in d.levels] for i, d in enumerate(space.decisions) if d.knob == self.knob}
        # parameters of one term
        size = {i: -space.decisions[i].alone[-1]["trainable_parameters"] // (ranks[0] - ranks[-1]) for i, ranks in decided.items()}
        left = sum(size[i] * ranks[base[i]] for i, ranks in decided.items())
        wanted = dict.fromkeys(decided, 0)
        ratios = [(-ratio, i) for i, ranks in decided.items() for ratio in given.statistics.inputs[space.decisions[i].site][: ranks[0]]]
        for _, i in sorted(ratios):
            if size[i] > left:
                break
            left -= size[i]
            wanted[i] += 1
        return nearest(given, base, wanted, decided)
