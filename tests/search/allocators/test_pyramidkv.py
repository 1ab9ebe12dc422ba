"""The straight line, against its closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest

from autoeff.search.allocators.cache import Tokens
from autoeff.search.allocators.pyramidkv import PyramidKV


@pytest.mark.parametrize("layers", [2, 5, 32])
def test_budgets_fall_in_a_straight_line_to_a_twentieth_of_the_mean(layers: int) -> None:
    found = PyramidKV().wanted(Tokens(layers, 128 * layers, 8, 4096, 8))
    assert sum(found) == pytest.approx(128 * layers)
    assert found[-1] == pytest.approx(8 + 120 / 20)
    assert found[0] == pytest.approx(8 + 2 * 120 - 120 / 20)
    assert all(a - b == pytest.approx((found[0] - found[-1]) / (layers - 1)) for a, b in pairwise(found))


def test_the_first_layer_keeps_the_context_at_most_and_the_last_one_gets_the_rest() -> None:
    found = PyramidKV().wanted(Tokens(4, 4 * 200, 8, 256, 8))
    assert found[0] == pytest.approx(256)
    assert found[-1] == pytest.approx(8 + 2 * 192 - 248)
    assert sum(found) == pytest.approx(800)


def test_where_nothing_is_left_beside_the_window_all_layers_are_alike() -> None:
    assert PyramidKV().wanted(Tokens(3, 3 * 6, 4, 256, 8)) == [6, 6, 6]
    assert PyramidKV().wanted(Tokens(1, 100, 4, 256, 8)) == [100]
