"""Statistics of weights against closed forms and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoeff.evaluators.model_statistics import Magnitudes
from autoeff.evaluators.weights import magnitudes_of, outlier_share, tail_exponent


def test_the_pq_index_is_0_for_equal_weights_and_nearly_1_for_a_single_one() -> None:
    assert magnitudes_of([torch.full((7, 9), -2.0)]).pq_index == pytest.approx(0, abs=1e-7)
    assert magnitudes_of([torch.eye(50)[:1]]).pq_index == pytest.approx(1 - 1 / 50)
    assert magnitudes_of([torch.zeros(5)]).pq_index == 0
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert 1 - magnitudes_of([normal]).pq_index == pytest.approx(0.847, abs=5e-3)  # E[sqrt|w|]^2 / E|w|


def test_quantiles_are_those_of_all_weights_together() -> None:
    parts = [torch.linspace(-1, 1, 601), torch.linspace(2, 3, 401).view(1, -1)]
    found = magnitudes_of(parts)
    every = np.sort(np.abs(np.concatenate([part.numpy().ravel() for part in parts])))
    assert found.weights == len(every) == 1002
    assert found.quantiles[0] == every[0]
    assert found.quantiles[-1] == every[-1]
    assert found.quantiles == pytest.approx(np.quantile(every, np.linspace(0, 1, 1001), method="nearest"), abs=4e-3)
    assert Magnitudes.from_json(found.to_json()) == found


def test_outliers_are_counted_over_all_linears_together() -> None:
    weights, norms = [torch.ones(3, 4), torch.ones(2, 5)], [torch.tensor([1.0, 1, 1, 100]), torch.ones(5)]
    scores = torch.cat([(w * n).flatten() for w, n in zip(weights, norms, strict=True)])
    assert outlier_share(weights, norms, 5) == pytest.approx(float((scores > 5 * scores.mean()).double().mean()), abs=1e-12)
    assert outlier_share(weights, norms, 0.5) == 3 / 22


def test_the_exponent_of_a_power_law_is_found() -> None:
    """Eigenvalues at the quantiles of a density x^-3: the exponent is 3."""
    places = (torch.arange(600, dtype=torch.float64) + 0.5) / 600
    eigenvalues = (1 - places) ** -0.5
    assert tail_exponent(torch.diag(eigenvalues.sqrt().float())) == pytest.approx(3, abs=0.1)
    stacked = torch.stack([torch.diag(torch.tensor([1.0, 2, 4, 8])), torch.diag(torch.tensor([1.0, 3, 9, 27]))])
    assert tail_exponent(stacked) == pytest.approx((tail_exponent(stacked[0]) + tail_exponent(stacked[1])) / 2)
