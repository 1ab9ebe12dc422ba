"""What a criterion is: a rule that chooses which weights of a linear stay; one file each under `criteria/`.

Every row of a weight keeps the same number, so that rows take equal bytes and only the share of a linear is left to decide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.plugins import plugins
from autoeff.spaces.quantizer import NO_STATISTICS

__all__ = ["Criterion", "Pattern", "Pruned", "ScoreCriterion", "known_criteria", "make_criterion"]


@dataclass(frozen=True)
class Pattern:
    """Where weights may stay: `kept` of every `of` consecutive inputs, in every row.

    Attributes:
        kept: From 0 to `of`.
        of: E.g. 4 for 2:4, which sparse tensor cores take; None for the whole row, which is unstructured sparsity.
    """

    kept: int
    of: int | None = None

    def __post_init__(self) -> None:
        if self.kept < 0 or (self.of is not None and not 1 <= self.of >= self.kept):
            raise InputError(f"a pattern must keep from 0 to all weights: got {self.kept} of {'a row' if self.of is None else self.of}")

    def kept_of(self, k: int) -> int:
        """Weights that a row of `k` inputs keeps.

        Raises:
            InputError: The pattern does not fit into such a row.
        """
        if self.of is None and self.kept > k:
            raise InputError(f"a row of {k} inputs cannot keep {self.kept} weights")
        if self.of is not None and k % self.of:
            raise InputError(f"{self.kept}:{self.of} needs inputs in multiples of {self.of}: got {k}")
        return self.kept if self.of is None else k // self.of * self.kept

    def mask(self, scores: Tensor) -> Tensor:
        """True where the greatest of `scores` [N, K] stand, bool; of equal ones in a row, those that come first."""
        n, k = scores.shape
        runs = scores.reshape(n, -1, self.of or k)
        best = torch.sort(runs, dim=2, descending=True, stable=True).indices[:, :, : self.kept]
        return torch.zeros_like(runs, dtype=torch.bool).scatter_(2, best, True).reshape(n, k)


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: float32 [N, K], 0 where pruned.
        mask: bool [N, K], True = kept; what is kept may be 0 too.
    """

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Criterion(ABC):
    """Base of every criterion.

    Attributes:
        name: As written in `--set sparsity.criterion=`.
        needs: Names of the calibration statistics of a linear that the rule reads (see `evaluators/calibration.py`).
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def prune(self, weight: Tensor, pattern: Pattern, statistics: Mapping[str, Tensor] = NO_STATISTICS) -> Pruned:
        """What `pattern` leaves of `weight`, on its device.

        Args:
            weight: float32 [N, K].
            pattern: How many stay, and where.
            statistics: What `needs` names, on any device.

        Raises:
            InputError: The weight holds NaN or infinity, the pattern does not fit, or a statistic cannot be used.
            ValueError: A statistic is missing.
        """
        if missing := sorted(self.needs - statistics.keys()):
            raise ValueError(f"criterion {self.name} needs the statistic {missing[0]!r}; got {', '.join(sorted(statistics)) or 'none'}")
        pattern.kept_of(weight.shape[1])
        if not bool(weight.isfinite().all()):
            raise InputError(f"a weight {list(weight.shape)} holds NaN or infinity and cannot be pruned; repair the checkpoint")
        return self.pruned(weight, pattern, {name: statistics[name].to(weight.device) for name in self.needs})

    @abstractmethod
    def pruned(self, weight: Tensor, pattern: Pattern, statistics: Mapping[str, Tensor]) -> Pruned:
        """The rule; `prune` has checked the arguments, and the statistics are on the weight's device."""


@dataclass(frozen=True)
class ScoreCriterion(Criterion):
    """A criterion that keeps the weights of greatest score and leaves them as they are.

    Attributes:
        power: Of scores when those of a unit are summed: 2 where they are like lengths, 1 where they are like losses.
    """

    power: ClassVar[int] = 2

    @abstractmethod
    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """A score for every weight, float32 [N, K], compared within a row; larger stays."""

    def pruned(self, weight: Tensor, pattern: Pattern, statistics: Mapping[str, Tensor]) -> Pruned:
        mask = pattern.mask(self.scores(weight, statistics))
        return Pruned(weight.masked_fill(~mask, 0.0), mask)


_WHERE = ("autoeff.spaces.criteria", Criterion, "autoeff.criteria")


def known_criteria() -> dict[str, type[Criterion]]:
    """Every criterion on this machine by name."""
    return plugins(*_WHERE)


def make_criterion(name: str) -> Criterion:
    """The criterion `name`.

    Raises:
        InputError: Unknown name.
    """
    if name not in (known := known_criteria()):
        raise InputError(f"unknown criterion {name!r}; known: {', '.join(sorted(known))}")
    made: Criterion = known[name]()
    return made
