"""NIRVANA: weights to which the greatest logits owe the most stay, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from autoeff.spaces.criterion import ScoreCriterion

__all__ = ["Nirvana"]


@dataclass(frozen=True)
class Nirvana(ScoreCriterion):
    """|w * dS/dw|, with S the mean over windows and vocabulary of the greatest logit along the window.

    To first order, how far S moves when that weight alone goes. Encoders have no logits; there S is taken of the features of the
    last hidden state. The source removes units in proportions that it balances over the whole model; here those are decisions. It
    is made for units: of single weights up to half go at a greater loss than by magnitude (`benchmarks/method_fronts.py`).

    Source: NIRVANA, arXiv:2509.14230.
    """

    name: ClassVar[str] = "nirvana"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    power: ClassVar[int] = 1

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        return (weight * statistics["gradient"]).abs()
