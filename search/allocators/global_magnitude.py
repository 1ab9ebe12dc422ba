"""One threshold on magnitudes for the whole model, with a floor of weights that every layer keeps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import ClassVar

from autoeff.evaluators.model_statistics import Magnitudes, ModelStatistics
from autoeff.search.allocators.pruning import PruningSeed

__all__ = ["GlobalMagnitude", "below_one_threshold"]

_FLOOR = 0.0005  # share of all weights that each layer keeps
_HALVINGS = 60


class GlobalMagnitude(PruningSeed):
    """The share of each layer below the threshold that prunes the whole model to the mean; layers smaller than the floor stay dense.

    Source: "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning", arXiv:2209.14624.
    """

    name: ClassVar[str] = "global_magnitude"
    needs: ClassVar[frozenset[str]] = frozenset({"magnitudes"})

    def wanted(self, sites: Sequence[str], mean: float, statistics: ModelStatistics) -> list[float]:
        layers = [statistics.magnitudes[site] for site in sites]
        floor = _FLOOR * sum(layer.weights for layer in layers)
        shares = zip(below_one_threshold(layers, mean), layers, strict=True)
        return [max(0.0, min(share, 1 - floor / layer.weights)) for share, layer in shares]


def below_one_threshold(layers: Sequence[Magnitudes], mean: float) -> list[float]:
    """The share of each layer below the one threshold that so large a share of all weights is below."""
    total = sum(layer.weights for layer in layers)
    low, high = 0.0, max(layer.quantiles[-1] for layer in layers)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        pruned = sum(layer.weights * _below(layer, middle) for layer in layers)
        low, high = (middle, high) if pruned < mean * total else (low, middle)
    return [_below(layer, high) for layer in layers]


def _below(layer: Magnitudes, threshold: float) -> float:
    """The share of a layer's weights below a threshold, interpolated between quantiles."""
    quantiles = layer.quantiles
    place = bisect_left(quantiles, threshold)
    if place == 0:
        return 0.0
    if place == len(quantiles):
        return 1.0
    step = quantiles[place] - quantiles[place - 1]
    return (place - 1 + ((threshold - quantiles[place - 1]) / step if step > 0 else 1.0)) / (len(quantiles) - 1)
