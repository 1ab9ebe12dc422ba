"""CAKE: layers whose attention is spread out and moves keep more."""

from __future__ import annotations

from typing import ClassVar

from autoeff.search.allocators.cache import CacheSeed, Tokens

__all__ = ["Cake"]

_TAU_DISPERSION = _TAU_SHIFT = 1.0  # the paper's code tunes them for some models, and takes 1 for others


class Cake(CacheSeed):
    """Besides the window, budgets are proportional to entropy times variance of the attention of the last queries.

    Source: CAKE, arXiv:2503.12491.
    """

    name: ClassVar[str] = "cake"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def wanted(self, tokens: Tokens) -> list[float]:
        preferences = [a.dispersion ** (1 / _TAU_DISPERSION) * a.shift ** (1 / _TAU_SHIFT) for a in tokens.attention]
        whole = sum(preferences)
        if whole == 0:
            return [tokens.mean] * tokens.layers
        left = tokens.total - tokens.window * tokens.layers
        return [tokens.window + left * preference / whole for preference in preferences]
