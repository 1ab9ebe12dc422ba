"""Experts that a token is sent to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.sites import Site, Structure

__all__ = ["Experts"]


@dataclass(frozen=True)
class Experts(Knob):
    """How many experts of a layer a token is sent to, from as many as the model was trained with down to one.

    The router keeps choosing the best ones, and their weights are normalised as the model does it. Saves arithmetic; every expert stays
    stored, and tokens of a batch meet many of them.

    Source: layer-adaptive expert numbers after LExI, arXiv:2509.02753.
    """

    name: ClassVar[str] = "experts"
    kind: ClassVar[Kind] = "runtime"

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "ffn" and _chosen(site) > 1]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return tuple(range(_chosen(site), 0, -1))

    def cost(self, site: Site, level: Level) -> Cost:
        fewer = _chosen(site) - int(level)
        each = sum(linear.in_features * linear.out_features for linear in site.linears if linear.experts)
        return {"flops_per_token": -2 * fewer * each} if fewer else {}

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == _chosen(site):
            return swap(model, {})
        router = _router(model, site)
        before = router.top_k

        def undo() -> None:
            router.top_k = before

        router.top_k = int(level)
        return undo


def _chosen(site: Site) -> int:
    """Experts that a token is sent to in the dense model; 0 where there are none."""
    return max((linear.experts_per_token for linear in site.linears if linear.experts), default=0)


def _router(model: nn.Module, site: Site) -> Any:
    """The module that chooses.

    Raises:
        InputError: None is known to.
    """
    found = [child for child in model.get_submodule(site.name).children() if getattr(child, "top_k", None) == _chosen(site)]
    if len(found) != 1:
        raise InputError(f"cannot understand {site.name}: no router whose top_k is {_chosen(site)}, so experts cannot be decided about")
    return found[0]
