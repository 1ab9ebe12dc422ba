"""Experts that a token is sent to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.mixture import chosen_experts, router_of
from autoeff.spaces.sites import Site, Structure

__all__ = ["Experts"]


@dataclass(frozen=True)
class Experts(Knob):
    """How many experts of a layer a token is sent to, from as many as the model was trained with down to one.

    The router keeps choosing the best ones, and their weights are normalised as the model does it. Saves arithmetic, and the reading of
    experts where a batch is sent to fewer of them; every expert stays stored (see `experts_kept`).

    Source: layer-adaptive expert numbers after LExI, arXiv:2509.02753.
    """

    name: ClassVar[str] = "experts"
    kind: ClassVar[Kind] = "runtime"

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "ffn" and chosen_experts(site) > 1]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return tuple(range(chosen_experts(site), 0, -1))

    def cost(self, site: Site, level: Level) -> Cost:
        fewer = site.parameters_per_token - self.left(site, level).parameters_per_token
        return {"flops_per_token": -2 * fewer} if fewer else {}

    def left(self, site: Site, level: Level) -> Site:
        linears = (replace(linear, experts_per_token=int(level)) if linear.experts else linear for linear in site.linears)
        return replace(site, linears=tuple(linears))

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == chosen_experts(site):
            return swap(model, {})
        router = router_of(model, site)
        before = router.top_k

        def undo() -> None:
            router.top_k = before

        router.top_k = int(level)
        return undo
