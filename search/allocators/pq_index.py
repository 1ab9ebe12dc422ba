"""PQ Index: layers whose weights are concentrated in few are pruned more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.search.allocators.pruning import PruningSeed

__all__ = ["PQIndex"]


class PQIndex(PruningSeed):
    """The share of zeros that the index of a layer's weights bounds, at p = 0.5 and q = 1: 1 - (1 - I). No data is needed.

    With these p and q the number of weights to keep is d (1 - I), so the share of zeros is the index itself.

    Source: "Pruning Deep Neural Networks from a Sparsity Perspective", arXiv:2302.05601.
    """

    name: ClassVar[str] = "pq_index"
    needs: ClassVar[frozenset[str]] = frozenset({"magnitudes"})

    def wanted(self, sites: Sequence[str], mean: float, statistics: ModelStatistics) -> list[float]:
        return [statistics.magnitudes[site].pq_index for site in sites]
