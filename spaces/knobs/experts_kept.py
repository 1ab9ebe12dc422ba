"""Experts that a layer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil, comb
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from autoeff.errors import InputError
from autoeff.kernels.moe import route
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.material import Material
from autoeff.spaces.mixture import choose_among, chosen_experts, experts_of, router_of
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["ExpertsKept"]

_ALIKE = 0.02  # largest relative difference of a mixture computed here from the model's own: 16-bit values


@dataclass(frozen=True)
class ExpertsKept(Knob):
    """How many experts of a layer stay stored; the others are removed, and the router chooses among those that stay.

    The set that stays is the one with which the layer's output changes least on the calibration text, `sum_t |F(x_t) - F_kept(x_t)|`, the
    router's weights normalised as the model does it. Few sets are all tried; where there are more, experts leave one by one, each time
    the one that is missed least. At least as many stay as a token is sent to. Saves the bytes of the experts, not arithmetic.

    No checkpoint in the original shapes can say that an expert is gone: an export holds zeros for it, and which ones stayed stands beside
    it (`levels.safetensors`). Without that, transformers alone still sends tokens to the zeros.

    Attributes:
        shares: Shares of the experts, below 1; levels are the numbers that they stand for.
        sets: Up to so many sets of a layer are all tried.

    Source: "Not All Experts are Equal", arXiv:2402.14800.
    """

    name: ClassVar[str] = "experts_kept"
    kind: ClassVar[Kind] = "structure"

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    sets: int = 128

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.shares) or list(self.shares) != sorted(set(self.shares), reverse=True):
            raise InputError(f"experts_kept.shares must fall between 1 and 0: got {', '.join(map(str, self.shares))}")
        if self.sets < 1:
            raise InputError(f"experts_kept.sets must be at least 1: got {self.sets}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"inputs", "routing", "outputs"})

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "ffn" and len(self.levels(site)) > 1]

    def levels(self, site: Site) -> tuple[Level, ...]:
        if not (chosen := chosen_experts(site)):
            return ()
        count = experts_of(site)[0].experts
        wanted = (max(chosen, ceil(round(share * count, 9))) for share in self.shares)
        return (count, *dict.fromkeys(kept for kept in wanted if kept < count))

    def cost(self, site: Site, level: Level) -> Cost:
        saved = site.parameters - self.left(site, level).parameters
        return {"linear_bytes": -BYTES_DENSE * saved} if saved else {}

    def left(self, site: Site, level: Level) -> Site:
        return replace(site, linears=tuple(replace(item, experts=int(level)) if item.experts else item for item in site.linears))

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        """The places of the kept experts, ascending, int64 `[kept]`: a choice, no part of what is served."""
        first, last = experts_of(site)
        known = material.needed(first.name)
        inputs, logits = known["inputs"].float(), known["routing"].float()
        gate_up = material.weights[first.name].float().view(first.experts, -1, first.in_features)
        down = material.weights[last.name].float().view(last.experts, -1, last.in_features)
        each = torch.stack([_expert(inputs, *pair) for pair in zip(gate_up, down, strict=True)], 1)  # [tokens, experts, stream]
        renormalise = _normalises(each, logits, chosen_experts(site), known["outputs"].float(), site.name)
        return {"experts": _best(each, logits, chosen_experts(site), renormalise, int(level), self.sets)}

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        rows = {
            item.name: (packed["experts"][:, None] * item.out_features + torch.arange(item.out_features)).flatten()
            for item in experts_of(site)
            if item.name in material.weights
        }
        return material.cut(rows, {})

    def apply_built(self, model: nn.Module, site: Site, level: Level, built: Mapping[str, Tensor]) -> Undo:
        if level == experts_of(site)[0].experts:
            return swap(model, {})
        return choose_among(router_of(model, site), built["experts"])


def _expert(inputs: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (inputs @ gate_up.T).chunk(2, 1)
    return (silu(gate) * up) @ down.T


def _weights(logits: Tensor, chosen: int, renormalise: bool) -> Tensor:
    """Of every expert for every token, 0 for those that are not chosen; `logits` [..., experts] may hold -inf."""
    flat = logits.flatten(0, -2)
    places, shares = route(flat, chosen, renormalise, rounded=False)
    return torch.zeros_like(flat).scatter_(1, places.long(), shares).view_as(logits)


def _normalises(each: Tensor, logits: Tensor, chosen: int, outputs: Tensor, name: str) -> bool:
    """Whether the weights of the chosen experts add up to 1, seen from what the model gave.

    Raises:
        InputError: Neither explains it: another activation or another way to choose.
    """
    found = {}
    for renormalise in (True, False):
        made = torch.einsum("te,tes->ts", _weights(logits, chosen, renormalise), each)
        found[renormalise] = float((made - outputs).norm() / outputs.norm().clamp_min(1e-30))
    if not min(found.values()) <= _ALIKE:
        raise InputError(f"cannot understand {name}: its experts and router give something else than a mixture of SwiGLU by softmax")
    return found[True] <= found[False]


def _best(each: Tensor, logits: Tensor, chosen: int, renormalise: bool, kept: int, most: int) -> Tensor:
    """The kept experts, ascending."""
    count = logits.shape[1]
    products = torch.einsum("tes,tfs->tef", each.double(), each.double())
    whole = _weights(logits, chosen, renormalise).double()

    def losses(sets: Tensor) -> Tensor:
        """Of sets of experts, bool [sets, experts]."""
        masked = logits[None].masked_fill(~sets[:, None], -torch.inf)
        change = _weights(masked, chosen, renormalise).double() - whole
        return torch.einsum("nte,tef,ntf->nt", change, products, change).clamp_min(0).sqrt().sum(1)

    if comb(count, kept) <= most:
        places = torch.tensor(list(combinations(range(count), kept)))
        sets = torch.zeros(len(places), count, dtype=torch.bool).scatter_(1, places, True)
        return places[int(losses(sets).argmin())]
    stays = torch.ones(count, dtype=torch.bool)
    for _ in range(count - kept):
        without = stays.repeat(int(stays.sum()), 1)
        without[torch.arange(len(without)), stays.nonzero()[:, 0]] = False
        stays = without[int(losses(without).argmin())]
    return stays.nonzero()[:, 0]
