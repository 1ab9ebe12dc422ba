"""AlphaPruning: blocks whose spectra have heavy tails, the well trained ones, are pruned less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.search.allocators.pruning import PruningSeed

__all__ = ["AlphaPruning"]

_SPREAD = 0.3  # epsilon of the paper


class AlphaPruning(PruningSeed):
    """Shares of zeros rise in a straight line with the exponent of the tail, from 0.7 to 1.3 times the mean. No data is needed.

    It decomposes every matrix, minutes for a billion parameters, so it must be asked for by name.

    Source: AlphaPruning, arXiv:2410.10912.
    """

    name: ClassVar[str] = "alphapruning"
    needs: ClassVar[frozenset[str]] = frozenset({"magnitudes", "spectra"})
    joins: ClassVar[bool] = False

    def wanted(self, sites: Sequence[str], mean: float, statistics: ModelStatistics) -> list[float]:
        exponents = [statistics.spectra[site] for site in sites]
        least, most = min(exponents), max(exponents)
        if most == least:
            return [mean] * len(sites)
        return [mean * (1 - _SPREAD + 2 * _SPREAD * (exponent - least) / (most - least)) for exponent in exponents]
