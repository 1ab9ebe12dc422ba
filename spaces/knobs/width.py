"""How many neurons an FFN keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from autoeff.spaces.units import UnitKnob

__all__ = ["Width"]


@dataclass(frozen=True)
class Width(UnitKnob):
    """The share of an FFN's neurons that is kept: rows of its first linears, columns of its last one.

    Saves bytes and arithmetic in proportion on any hardware.

    Attributes:
        multiple: Neurons are kept in multiples of it; tensor cores like 64 or more.

    Source: dependency groups after DepGraph, arXiv:2301.12900; scores after Wanda, arXiv:2306.11695.
    """

    name: ClassVar[str] = "width"
    sublayer: ClassVar[Literal["attention", "ffn"]] = "ffn"

    multiple: int = 8
