"""What rules for sparsity have in common: a share of zeros for each layer, with the mean that the budget asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.search.allocators.dp import Allocator
from autoeff.search.allocators.nearest import nearest
from autoeff.search.seed import Formula, Given
from autoeff.spaces.configuration import Level

__all__ = ["PruningSeed", "scaled", "share_of_zeros"]

_HALVINGS = 100


class PruningSeed(Formula):
    """A rule that says which share of each layer's weights is zero.

    Everything else is as in the additive optimum, and so is the mean share over all weights: the rule distributes it. Levels are those
    nearest to what the rule wants, see `nearest`.
    """

    knob: ClassVar[str] = "sparsity"

    @abstractmethod
    def wanted(self, sites: Sequence[str], mean: float, statistics: ModelStatistics) -> list[float]:
        """Shares of zeros of the sites, up to a common factor that brings their mean over the weights to `mean`."""

    def configuration(self, given: Given) -> tuple[int, ...] | None:
        space = given.problem.space
        base = Allocator(space, given.problem.cost_model, given.limits).solve(given.damage)
        if base is None:
            return None
        layers = [i for i, (d, on) in enumerate(zip(space.decisions, space.active(base), strict=True)) if d.knob == self.knob and on]
        amounts = {i: [share_of_zeros(level) for level in space.decisions[i].levels] for i in layers}
        weights = [given.statistics.magnitudes[space.decisions[i].site].weights for i in layers]
        pruned = sum(n * amounts[i][base[i]] for n, i in zip(weights, layers, strict=True))
        if pruned == 0:
            return None
        mean = pruned / sum(weights)
        wanted = self.wanted([space.decisions[i].site for i in layers], mean, given.statistics)
        most = max(max(levels) for levels in amounts.values())
        return nearest(given, base, dict(zip(layers, scaled(wanted, weights, mean, most), strict=True)), amounts)


def share_of_zeros(level: Level) -> float:
    """Of a level of `sparsity`: a ratio, or N:M with N of M kept."""
    if isinstance(level, str):
        kept, of = level.split(":")
        return 1 - int(kept) / int(of)
    return float(level)


def scaled(wanted: Sequence[float], weights: Sequence[int], mean: float, most: float) -> list[float]:
    """The wanted values times the one factor with which, none above `most`, their weighted mean is `mean`.

    Args:
        wanted: At least 0; all 0 stands for all equal.
        weights: Of each.
        mean: At most `most`.
        most: Of each.
    """
    wanted = [max(0.0, w) for w in wanted] if any(w > 0 for w in wanted) else [1.0] * len(wanted)

    def clipped(factor: float) -> list[float]:
        return [min(most, factor * w) for w in wanted]

    def mean_of(values: Sequence[float]) -> float:
        return sum(n * v for n, v in zip(weights, values, strict=True)) / sum(weights)

    low, high = 0.0, 1.0
    while mean_of(clipped(high)) < mean and high < 1e12:  # values that are zero stay so, and the others then reach `most`
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(clipped(middle)) < mean else (low, middle)
    return clipped(high)
