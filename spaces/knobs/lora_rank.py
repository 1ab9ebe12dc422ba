"""Ranks of trained adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.adapters import adapters_at, with_rank
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["OPTIMIZERS", "LoraRank"]

OPTIMIZERS = ("adamw", "adam", "sgd")


@dataclass(frozen=True)
class LoraRank(Knob):
    """The rank of a low-rank adapter that is trained on the text given as `--tune-data`; 0 leaves a linear without one.

    One adapter of the greatest rank is trained first, everywhere at once, with ranks drawn anew in every step, so that each prefix of
    its terms is an adapter by itself: that gives a value to any choice of ranks without training. The model with this adapter in full is
    what candidates are compared with, and what limits such as `0.5x` refer to; lower ranks save trainable parameters, and 16-bit
    bytes. Experts have no adapters. Adapters keep the shapes of the checkpoint, so nothing that cuts or replaces linears is searched beside
    them.

    Attributes:
        ranks: Levels, falling; the first is the rank of the adapter that is trained, 0 is no adapter.
        tokens: Of the tuning text that are seen in training, repeats included.
        batch: Windows in a step.
        learning_rate: The greatest; it rises for a twentieth of the steps, and falls to 0.
        optimizer: `adamw`, `adam` or `sgd`.

    Source: LoRA, arXiv:2106.09685; prefixes of all ranks in one training after DyLoRA, arXiv:2210.07558.
    """

    name: ClassVar[str] = "lora_rank"
    kind: ClassVar[Kind] = "trained"
    conflicts: ClassVar[frozenset[str]] = frozenset({"heads", "rank", "skip", "width"})

    ranks: tuple[int, ...] = (16, 8, 4, 2, 0)
    tokens: int = 200_000
    batch: int = 8
    learning_rate: float = 0.005
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if len(self.ranks) < 2 or list(self.ranks) != sorted(set(self.ranks), reverse=True) or self.ranks[-1] < 0:
            raise InputError(f"lora_rank.ranks must fall to 0 or above, two at least: got {', '.join(map(str, self.ranks)) or 'none'}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"lora_rank.optimizer must be one of {', '.join(OPTIMIZERS)}: got {self.optimizer!r}")
        for name in ("tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"lora_rank.{name} must be at least 1: got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"lora_rank.learning_rate must be above 0: got {self.learning_rate}")

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "linears" and not any(linear.experts for linear in site.linears)]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return self.ranks

    def constants(self, structure: Structure) -> Mapping[str, int]:
        count = sum(self.ranks[0] * _of_one_rank(site) for site in self.sites(structure))
        return {"trainable_parameters": count, "adapter_bytes": BYTES_DENSE * count}

    def cost(self, site: Site, level: Level) -> Cost:
        saved = (int(level) - self.ranks[0]) * _of_one_rank(site)
        return {"trainable_parameters": saved, "adapter_bytes": BYTES_DENSE * saved} if saved else {}

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == self.ranks[0]:
            return swap(model, {})
        return with_rank(adapters_at(model, (linear.name for linear in site.linears)), int(level))


def _of_one_rank(site: Site) -> int:
    """Parameters of one term of every linear's adapter."""
    return sum(linear.in_features + linear.out_features for linear in site.linears)
