"""Wanda: weights that are small, or whose inputs are, go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from autoeff.spaces.criterion import ScoreCriterion

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda(ScoreCriterion):
    """|w_ij| times the norm of input j over the calibration text, compared within a row.

    Its square is the output error of pruning that weight alone.

    Source: Wanda, arXiv:2306.11695.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        return weight.abs() * statistics["input_norm"]
