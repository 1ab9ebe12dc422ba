"""Linears stored as 8-bit floats: an example of a knob in a package of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["Float8"]

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Float8(Knob):
    """Weights as 8-bit floats (E4M3) with an fp16 scale for each row.

    Attributes:
        clip: Share of a row's greatest magnitude that becomes the largest 8-bit float; what lies beyond is clamped.

    Source: FP8 Formats for Deep Learning, arXiv:2209.05433.
    """

    name: ClassVar[str] = "float8"
    kind: ClassVar[Kind] = "weight"
    conflicts: ClassVar[frozenset[str]] = frozenset({"bits", "sparsity"})  # they store the values too

    clip: float = 1.0

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "linears"]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return ("fp16", "fp8")

    def cost(self, site: Site, level: Level) -> Cost:
        if level == "fp16":
            return {}
        packed = sum(linear.parameters + 2 * linear.rows for linear in site.linears)  # a byte a weight, two a row
        return {"linear_bytes": packed - BYTES_DENSE * site.parameters}

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, weight in material.weights.items():
            scale = (weight.float().abs().amax(1) * self.clip / _LARGEST).clamp(min=2**-24).half()  # the least positive fp16
            codes = (weight.float() / scale.float()[:, None]).clamp(-_LARGEST, _LARGEST)
            stored |= {f"{name}.codes": codes.to(torch.float8_e4m3fn), f"{name}.scale": scale}
        return stored

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        values = {
            name: (packed[f"{name}.codes"].float() * packed[f"{name}.scale"].float()[:, None]).to(weight.dtype)
            for name, weight in material.weights.items()
        }
        return material.with_weights(values)
