"""The additive optimum by dynamic programming, as a rule that can be asked for by name."""

from __future__ import annotations

from typing import ClassVar

from autoeff.search.allocators.dp import Allocator
from autoeff.search.seed import Formula, Given

__all__ = ["AdditiveOptimum"]


class AdditiveOptimum(Formula):
    """The configuration of least summed damage within the limits. Every search has it among its baselines.

    Source: the dual of L-GreCo's program, arXiv:2210.17357.
    """

    name: ClassVar[str] = "dp"
    knob: ClassVar[None] = None
    joins: ClassVar[bool] = False

    def configuration(self, given: Given) -> tuple[int, ...] | None:
        return Allocator(given.problem.space, given.problem.cost_model, given.limits).solve(given.damage)
