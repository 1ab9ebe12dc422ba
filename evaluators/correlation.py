"""Rank correlation, without the second that importing scipy.stats takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["spearman"]

Floats = NDArray[np.float64]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two vectors of finite numbers, ties at their mean rank; not a number where one is constant."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: ArrayLike) -> Floats:
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    ranks: Floats = counts.cumsum() - (counts - 1) / 2
    return ranks[inverse]
