"""NIRVANA: how much of the budget attention pays and how much the FFNs, and one threshold for all units of a kind."""

from __future__ import annotations

from typing import ClassVar

from autoeff.search.allocators.dp import Allocator
from autoeff.search.allocators.global_magnitude import below_one_threshold
from autoeff.search.allocators.nearest import nearest
from autoeff.search.seed import Formula, Given

__all__ = ["Nirvana"]

_GAMMA = 3.36  # the source's for Llama 3.1 8B; 3.0 for Llama 3.2 3B


class Nirvana(Formula):
    """FFNs lose 3.36 times the share of their neurons that attentions lose of their KV heads, where `heads` is searched, too.

    As many weights go as in the additive optimum, whose other decisions stay. Within each kind the units of least saliency go, wherever
    they are, as the criterion of that name scores them: one threshold over all layers.

    Source: NIRVANA, arXiv:2509.14230.
    """

    name: ClassVar[str] = "nirvana"
    knob: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})
    joins: ClassVar[bool] = False

    def configuration(self, given: Given) -> tuple[int, ...] | None:
        space, saliency = given.problem.space, given.statistics.saliency
        base = Allocator(space, given.problem.cost_model, given.limits).solve(given.damage)
        if base is None:
            return None
        active = space.active(base)
        kinds = {kind: [i for i, d in enumerate(space.decisions) if d.knob == kind and active[i]] for kind in ("heads", "width")}
        gone = {i: [1 - float(level) for level in space.decisions[i].levels] for kind in kinds.values() for i in kind}
        layers = {i: saliency[space.decisions[i].site] for i in gone}
        of_heads, of_width = (sum(layers[i].weights for i in kind) for kind in kinds.values())
        pruned = sum(layers[i].weights * gone[i][base[i]] for i in gone)
        if not pruned:
            return None
        width = min(max((max(gone[i]) for i in kinds["width"]), default=0.0), _GAMMA * pruned / (of_heads + _GAMMA * of_width))
        shares = {"heads": (pruned - width * of_width) / of_heads if of_heads else 0.0, "width": width}
        wanted = {
            i: share
            for kind, members in kinds.items()
            for i, share in zip(members, below_one_threshold([layers[i] for i in members], shares[kind]) if members else [], strict=True)
        }
        return nearest(given, base, wanted, gone)
