"""Weights left out one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.criterion import Criterion, Pattern, make_criterion
from autoeff.spaces.knob import Cost, Kind, Knob
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["Sparsity"]

_DENSE = 0
_UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Sparsity(Knob):
    """A share of every row's weights is zero; what is kept is stored with one bit of mask per weight.

    A level saves bytes, not arithmetic. Every row keeps equally many weights. The mask weighs a bit a weight: at 4 bits and a quarter
    of zeros it takes what it saves, and fewer bits are the better bargain.

    Attributes:
        criterion: Name of a criterion, see `autoeff.spaces.criteria`.
        pattern: `unstructured`, or `N:M` to keep N of every M inputs; 2:4 is what sparse tensor cores take.
        ratios: Shares of the weights that are zero, without a pattern.

    Source: Wanda, arXiv:2306.11695; SparseGPT, arXiv:2301.00774.
    """

    name: ClassVar[str] = "sparsity"
    kind: ClassVar[Kind] = "weight"
    beside: ClassVar[frozenset[str]] = frozenset({"mask"})

    criterion: str = "wanda"
    pattern: str = _UNSTRUCTURED
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        _ = self._criterion  # a wrong setting is reported here
        if self.pattern != _UNSTRUCTURED:
            if not re.fullmatch(r"[1-9]\d?:[1-9]\d?", self.pattern):
                raise InputError(f"sparsity.pattern must be unstructured or N:M such as 2:4: got {self.pattern!r}")
            if self._run.kept >= int(self._run.of or 0):
                raise InputError(f"sparsity.pattern {self.pattern!r} prunes nothing; write N:M with N below M, such as 2:4")
        if not all(0 < ratio < 1 for ratio in self.ratios) or list(self.ratios) != sorted(set(self.ratios)):
            raise InputError(f"sparsity.ratios must rise between 0 and 1: got {', '.join(map(str, self.ratios))}")

    @property
    def needs(self) -> frozenset[str]:
        return self._criterion.needs

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "linears"]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """0 and every share that saves bytes; a pattern needs inputs in multiples of its run."""
        if self.pattern == _UNSTRUCTURED:
            return (_DENSE, *(ratio for ratio in self.ratios if self.cost(site, ratio)["linear_bytes"] < 0))
        fits = all(linear.in_features % int(self._run.of or 1) == 0 for linear in site.linears)
        return (_DENSE, self.pattern) if fits and self.cost(site, self.pattern)["linear_bytes"] < 0 else (_DENSE,)

    def cost(self, site: Site, level: Level) -> Cost:
        if level == _DENSE:
            return {}
        masks = sum(linear.rows * -(-linear.in_features // 8) for linear in site.linears)
        kept = sum(linear.kept_parameters for linear in self.left(site, level).linears)
        return {"linear_bytes": masks + BYTES_DENSE * (kept - site.parameters)}

    def left(self, site: Site, level: Level) -> Site:
        if level == _DENSE:
            return site
        linears = (replace(linear, kept=self._pattern(level, linear.in_features).kept_of(linear.in_features)) for linear in site.linears)
        return replace(site, linears=tuple(linears))

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, weight in material.weights.items():
            values = weight.to(material.device, torch.float32)
            pruned = self._criterion.prune(values, self._pattern(level, weight.shape[1]), material.needed(name))
            stored[f"{name}.mask"] = _packed(pruned.mask.cpu())
            stored[f"{name}.values"] = pruned.weight[pruned.mask].view(len(weight), -1).to("cpu", weight.dtype)
        return stored

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        weights, masks = {}, {}
        for name, weight in material.weights.items():
            masks[name] = _unpacked(packed[f"{name}.mask"], weight.shape[1])
            weights[name] = torch.zeros_like(weight).masked_scatter_(masks[name], packed[f"{name}.values"])
        return material.with_weights(weights, masks)

    def _pattern(self, level: Level, k: int) -> Pattern:
        """What a row of `k` inputs keeps: at least one weight."""
        return self._run if self.pattern != _UNSTRUCTURED else Pattern(max(1, round(k * (1 - float(level)))))

    @cached_property
    def _criterion(self) -> Criterion:
        return make_criterion(self.criterion)

    @cached_property
    def _run(self) -> Pattern:
        n, m = self.pattern.split(":")
        return Pattern(int(n), int(m))


def _packed(mask: Tensor) -> Tensor:
    """A bit per weight, little-endian: uint8 [N, ceil(K / 8)] of bool [N, K]."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def _unpacked(bits: Tensor, k: int) -> Tensor:
    return (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten(1)[:, :k]
