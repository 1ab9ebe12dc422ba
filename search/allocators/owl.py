"""OWL: blocks with many outliers are pruned less."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.search.allocators.pruning import PruningSeed

__all__ = ["Owl"]

_SPREAD = 0.08  # lambda of the paper


class Owl(PruningSeed):
    """Shares of zeros fall in a straight line from the block with fewest outliers to the one with most, by 0.16 in all.

    Experts have no outlier share; their layers take the mean.

    Source: OWL, arXiv:2310.05175.
    """

    name: ClassVar[str] = "owl"
    needs: ClassVar[frozenset[str]] = frozenset({"magnitudes", "outliers"})

    def wanted(self, sites: Sequence[str], mean: float, statistics: ModelStatistics) -> list[float]:
        shares = statistics.outliers
        found = [shares[site] for site in sites if site in shares]
        least, most = min(found, default=0.0), max(found, default=0.0)
        if most == least:
            return [mean] * len(sites)
        spared = [2 * _SPREAD * (shares[site] - least) / (most - least) if site in shares else None for site in sites]
        middle = fmean(s for s in spared if s is not None)
        return [mean if s is None else mean - s + middle for s in spared]
