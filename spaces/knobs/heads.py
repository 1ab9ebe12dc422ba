"""How many heads attention keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from autoeff.spaces.units import UnitKnob

__all__ = ["Heads"]


@dataclass(frozen=True)
class Heads(UnitKnob):
    """The share of a layer's KV heads that is kept, each with its group of query heads.

    Saves bytes, arithmetic and cache in proportion on any hardware that serves layers with different numbers of heads.

    Source: dependency groups after DepGraph, arXiv:2301.12900; grouped-query attention, arXiv:2305.13245.
    """

    name: ClassVar[str] = "heads"
    sublayer: ClassVar[Literal["attention", "ffn"]] = "attention"
