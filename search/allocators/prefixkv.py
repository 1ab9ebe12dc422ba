"""PrefixKV: every layer keeps the same share of its attention."""

from __future__ import annotations

from bisect import bisect_left
from typing import ClassVar

from autoeff.search.allocators.cache import CacheSeed, Tokens

__all__ = ["PrefixKV"]

_HALVINGS = 60


class PrefixKV(CacheSeed):
    """One share p of the attention for all layers, so that the tokens that receive it add up to the budget; p by bisection.

    Source: PrefixKV, arXiv:2412.03409.
    """

    name: ClassVar[str] = "prefixkv"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def wanted(self, tokens: Tokens) -> list[float]:
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(self.needed(tokens, middle)) < tokens.total else (low, middle)
        below, above = self.needed(tokens, low), self.needed(tokens, high)
        # where p jumps over the total, the point between that meets it
        span = sum(above) - sum(below)
        between = 0.0 if span == 0 else min(1.0, max(0.0, (tokens.total - sum(below)) / span))
        return [a + between * (b - a) for a, b in zip(below, above, strict=True)]

    def needed(self, tokens: Tokens, share: float) -> list[float]:
        """Tokens of each layer that receive a share of its attention, of a context of `tokens.most`."""
        found = []
        for layer in tokens.attention:
            count = min(len(layer.mass), bisect_left(layer.mass, share) + 1)
            found.append(min(max(count * tokens.most / len(layer.mass), tokens.least), tokens.most))
        return found
