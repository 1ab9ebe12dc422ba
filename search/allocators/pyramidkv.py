"""PyramidKV: early layers keep more tokens, in a straight line."""

from __future__ import annotations

from typing import ClassVar

from autoeff.search.allocators.cache import CacheSeed, Tokens

__all__ = ["PyramidKV"]

_BETA = 20  # of the paper's code: the last layer keeps a 20th of the mean


class PyramidKV(CacheSeed):
    """Besides the window, budgets fall in a straight line from the first layer to a 20th of the mean in the last; no statistics.

    Source: PyramidKV, arXiv:2406.02069.
    """

    name: ClassVar[str] = "pyramidkv"

    def wanted(self, tokens: Tokens) -> list[float]:
        mean = tokens.mean - tokens.window
        last = mean / _BETA
        first = 2 * mean - last
        if first > tokens.most - tokens.window:
            first = tokens.most - tokens.window
            last = 2 * mean - first
        if tokens.layers == 1 or not first >= mean >= last >= 0:
            return [tokens.mean] * tokens.layers
        step = (first - last) / (tokens.layers - 1)
        return [tokens.window + first - step * layer for layer in range(tokens.layers)]
