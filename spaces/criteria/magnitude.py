"""Magnitude: small weights go; no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from autoeff.spaces.criterion import ScoreCriterion

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(ScoreCriterion):
    """|w|, compared within a row.

    Source: Han et al., arXiv:1506.02626.
    """

    name: ClassVar[str] = "magnitude"

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        return weight.abs()
