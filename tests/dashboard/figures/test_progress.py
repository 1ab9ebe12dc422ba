"""The dominated share."""

from __future__ import annotations

import pytest

from autoeff.dashboard.figures.progress import bests_of, draw_best, draw_progress, steps_of
from autoeff.dashboard.theme import LIGHT


def test_the_share_is_that_of_the_drawn_box() -> None:
    steps = steps_of([(0, 1.0, 1.0), (1, 0.0, 10.0), (2, 0.0, 1.0)])
    # the box reaches 2 % beyond [0, 1] x [0, 1] in cost and logarithm of quality
    whole = 1.02 * 1.02
    expected = [0.02 * 1.02 / whole, (0.02 * 1.02 + 1.02 * 0.02 - 0.02 * 0.02) / whole, 1.0, 1.0]
    assert [step.at for step in steps] == [0, 1, 2, 2]
    assert [step.value for step in steps] == pytest.approx(expected)


def test_what_has_no_place_is_left_out() -> None:
    assert steps_of([]) == []
    assert steps_of([(0, 1.0, 0.0)]) == []
    assert len(steps_of([(0, 1.0, -1.0), (1, 0.5, -2.0)], linear=True)) == 3


def test_the_line_ends_at_the_last_trial() -> None:
    drawn = draw_progress(steps_of([(3, 1.0, 1.0), (9, 2.0, 2.0)]), LIGHT, title="trial", revision="")
    assert list(drawn.data[0].x) == [3, 9]
    assert drawn.layout.xaxis.title.text == "trial"


def test_the_best_is_drawn_beside_the_baselines_that_are_near() -> None:
    steps = bests_of([(2, 9.0), (3, 1.0), (5, 1.5), (7, 0.5), (9, 0.8)])
    assert [(step.at, step.value) for step in steps] == [(2, 9.0), (3, 1.0), (7, 0.5), (9, 0.5)]
    assert bests_of([]) == []
    drawn = draw_best(steps, {"near": 0.75, "far": 8.0}, LIGHT, quality="kl", title="trial", linear=False, revision="")
    assert [line.y0 for line in drawn.layout.shapes] == [0.75]
    low, high = drawn.layout.yaxis.range
    assert low < 0.5
    assert 2.5 < high < 9.0  # the first steps are cut
