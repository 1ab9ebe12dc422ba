"""Sublayers left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["Skip"]


@dataclass(frozen=True)
class Skip(Knob):
    """Attention or FFN sublayers whose branch adds nothing to the residual stream.

    Saves the sublayer's linears, its arithmetic and, for attention, its cache. Applied as zeros in the output projection and its
    bias, which is what the `hf-dense` export writes: the branch is then exactly zero.

    Source: "What Matters in Transformers? Not All Attention is Needed", arXiv:2406.15786; FinerCut, arXiv:2405.18218.
    """

    name: ClassVar[str] = "skip"
    kind: ClassVar[Kind] = "structure"
    uniform: ClassVar[bool] = False

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind in ("attention", "ffn")]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return ("keep", "skip")

    def cost(self, site: Site, level: Level) -> Cost:
        if level == "keep":
            return {}
        saved = {"linear_bytes": -BYTES_DENSE * site.parameters, "flops_per_token": -2 * site.parameters_per_token}
        return saved | ({"kv_bytes_per_token": -site.kv_bytes} if site.kv_bytes else {})

    def silences(self, site: Site, level: Level) -> bool:
        return level == "skip"

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == "keep":
            return swap(model, {})
        return swap(model, {name: torch.zeros_like(model.get_parameter(name)) for name in site.outputs})
