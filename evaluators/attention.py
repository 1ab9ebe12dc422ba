"""What the dense model attends to on the search text: what rules that share out a cache's budget among the layers go by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoeff.evaluators.model_statistics import AttentionStatistics

__all__ = ["Moments", "OfWindows", "mean_of", "of_windows"]


OfWindows = tuple[Tensor, Tensor, Tensor]
"""Mass float64 [windows, tokens], dispersion and shift float64 [windows]."""


class Moments:
    """Mean and covariance of vectors [B, heads, tokens, D], head by head, over everything that was added."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        rows = vectors.transpose(0, 1).flatten(1, 2).double()
        self._count += rows.shape[1]
        self._sum = rows.sum(1) + (0 if self._sum is None else self._sum)
        self._products = rows.mT @ rows + (0 if self._products is None else self._products)

    def tensors(self) -> dict[str, Tensor]:
        """`mean` [heads, D] and `covariance` [heads, D, D], float32 on the CPU."""
        assert self._sum is not None
        assert self._products is not None
        mean = self._sum / self._count
        covariance = self._products / self._count - mean[:, :, None] * mean[:, None]
        return {"mean": mean.float().cpu(), "covariance": covariance.float().cpu()}


def of_windows(seen_by: Tensor, queries: int) -> OfWindows:
    """The statistics of some windows.

    Args:
        seen_by: Attention, float [windows, KV heads, query heads of each, T, T], rows summing to 1.
        queries: The last ones, which look back on the tokens before them.
    """
    received = seen_by.sum(3, dtype=torch.float64).mean((1, 2))
    mass = received.sort(1, descending=True).values.cumsum(1) / received.sum(1, keepdim=True)
    back = seen_by[..., -queries:, :-queries].double()
    return mass, torch.special.entr(back).sum((1, 2, 3, 4)), back.var(3, correction=0).sum((1, 2, 3))


def mean_of(batches: Sequence[OfWindows]) -> AttentionStatistics:
    """Over the windows of all batches."""
    mass, dispersion, shift = (torch.cat(parts).mean(0) for parts in zip(*batches, strict=True))
    return AttentionStatistics(tuple(mass.tolist()), float(dispersion), float(shift))
