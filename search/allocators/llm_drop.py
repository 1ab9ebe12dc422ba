"""LLM-Drop: the sublayers that change the residual stream least are left out first."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from autoeff.search.allocators.dp import Allocator
from autoeff.search.seed import Formula, Given

__all__ = ["LlmDrop", "around"]


class LlmDrop(Formula):
    """Attention and FFN in one list by how little they change the residual stream.

    As many are left out as in the additive optimum, or more where the limits ask for it. Everything else is solved again around them.

    Source: "What Matters in Transformers? Not All Attention is Needed", arXiv:2406.15786.
    """

    name: ClassVar[str] = "llm_drop"
    knob: ClassVar[str] = "skip"
    needs: ClassVar[frozenset[str]] = frozenset({"changes"})

    def configuration(self, given: Given) -> tuple[int, ...] | None:
        space = given.problem.space
        allocator = Allocator(space, given.problem.cost_model, given.limits)
        base = allocator.solve(given.damage)
        sublayers = [i for i, decision in enumerate(space.decisions) if decision.knob == self.knob]
        if base is None or not any(base[i] for i in sublayers):
            return None
        sublayers.sort(key=lambda i: (given.statistics.changes[space.decisions[i].site], i))
        for count in range(sum(base[i] > 0 for i in sublayers), len(sublayers) + 1):
            if (found := around(given, allocator, sublayers[:count])) is not None:
                return found
        return None


def around(given: Given, allocator: Allocator, left_out: Collection[int]) -> tuple[int, ...] | None:
    """The additive optimum with exactly these decisions of `skip` taken; None where it breaks the limits."""
    allowed = [
        [int(i in left_out)] if d.knob == LlmDrop.knob else range(len(d.levels)) for i, d in enumerate(given.problem.space.decisions)
    ]
    return allocator.solve(given.damage, allowed)
