"""Rank correlation against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from autoeff.evaluators.correlation import spearman


def test_ranks_correlate_as_in_scipy_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 200).tolist(), rng.normal(size=200).round(1).tolist()
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_a_constant_has_no_ranks_to_correlate() -> None:
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
