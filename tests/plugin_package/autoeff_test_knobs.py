"""Third-party knobs for the tests: `noise` works, `faulty` harms the process that applies it.

The folder is a distribution as an installer leaves it (a module and its `.dist-info`): put it on `sys.path` or `PYTHONPATH`.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Site, Structure

__all__ = ["Faulty", "Noise"]


@dataclass(frozen=True)
class Noise(Knob):
    """Gaussian noise of a level's percentage of the weight's own deviation; pretends to save that many bytes per linear.

    Attributes:
        seed: Of the noise.
    """

    name: ClassVar[str] = "noise"
    kind: ClassVar[Kind] = "weight"
    conflicts: ClassVar[frozenset[str]] = frozenset({"bits"})  # both replace the weight

    seed: int = 0

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "linears"]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return (0, 1, 10, 100)

    def cost(self, site: Site, level: Level) -> Cost:
        return {"linear_bytes": -int(level) * len(site.linears)} if level else {}

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        noisy: dict[str, Tensor] = {}
        for name, weight in material.weights.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {self.seed}".encode()))
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * int(level) / 100
            noisy[f"{name}.weight"] = (weight.float() + noise).to(weight.dtype)
        return noisy

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        return material.with_weights({name: packed[f"{name}.weight"] for name in material.weights})


@dataclass(frozen=True)
class Faulty(Knob):
    """Every way in which a candidate can go wrong, done for real when applied."""

    name: ClassVar[str] = "faulty"
    kind: ClassVar[Kind] = "runtime"
    uniform: ClassVar[bool] = False

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "ffn"]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return ("none", "segfault", "hog", "loop", "raise", "nan", "forks", "no memory", "device")

    def cost(self, site: Site, level: Level) -> Cost:
        i = self.levels(site).index(level)
        return {"flops_per_token": -i} if i else {}

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == "segfault":
            ctypes.string_at(0)
        if level == "hog":
            kept = []
            while True:
                kept.append(b"\1" * (1 << 24))  # written, so that it is resident
        if level == "forks":
            for _ in range(2):  # four processes, this one included
                os.fork()
        while level in ("loop", "forks"):
            pass
        if level == "raise":
            raise RuntimeError("faulty knob: told to raise")
        if level == "no memory":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        if level == "device":
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        if level == "nan":
            names = [f"{linear.name}.weight" for linear in site.linears]
            return swap(model, {name: torch.full_like(model.get_parameter(name), torch.nan) for name in names})
        return swap(model, {})
