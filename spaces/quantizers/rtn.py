"""Round to nearest, group by group: no data, no search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from autoeff.spaces.grid import Grid, grouped
from autoeff.spaces.quantizer import NO_STATISTICS, Codes, Quantizer

__all__ = ["RoundToNearest"]


@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """Every weight at the nearest of evenly spaced values that span its group.

    Asymmetric: 2^b values from the group's least to its greatest weight. Symmetric: 2^b - 1 values around zero (code 0 stays
    unused), out to the weight of greatest magnitude. Minimum and scale are rounded to fp16 first, the scale up, and the codes are
    taken against the rounded ones; so every weight is at most scale / 2 from its value, before that value is itself rounded to 16
    bits. A group of equal weights has scale 0 and keeps its value. Pruned weights have no part in any of it.

    Source: the baseline of GPTQ, arXiv:2210.17323.
    """

    name: ClassVar[str] = "rtn"
    nests: ClassVar[bool] = True

    def codes(self, weight: Tensor, bits: int, mask: Tensor | None = None, statistics: Mapping[str, Tensor] = NO_STATISTICS) -> Codes:
        groups, kept = grouped(weight, mask, self.group_of(weight))
        grid = Grid.spanning(groups, kept, bits, self.symmetric)
        return Codes.on(grid, grid.nearest(groups), weight.shape[1])
