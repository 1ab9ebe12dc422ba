"""Preferences of layers, against the formula."""

from __future__ import annotations

import pytest

from autoeff.evaluators.model_statistics import AttentionStatistics
from autoeff.search.allocators.cache import Tokens
from autoeff.search.allocators.cake import Cake


def layer(dispersion: float, shift: float) -> AttentionStatistics:
    return AttentionStatistics((1.0,), dispersion, shift)


def test_beside_the_window_budgets_are_as_entropy_times_variance() -> None:
    found = Cake().wanted(Tokens(3, 300, 8, 1024, 10, (layer(1, 1), layer(2, 1), layer(2, 3))))
    assert found == pytest.approx([10 + 270 * p / 9 for p in (1, 2, 6)])


def test_what_a_layer_cannot_keep_goes_to_the_others_evenly() -> None:
    found = Cake().shares(Tokens(3, 300, 8, 128, 10, (layer(1, 1), layer(2, 1), layer(2, 3))))
    assert sum(found) == 300
    assert found[2] == 128
    assert found[1] - found[0] == pytest.approx(30, abs=1)


def test_attention_that_says_nothing_shares_evenly() -> None:
    assert Cake().wanted(Tokens(2, 50, 8, 128, 10, (layer(0, 1), layer(3, 0)))) == [25, 25]
