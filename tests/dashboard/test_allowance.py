"""Sliders and the limits that they stand for."""

from __future__ import annotations

from typing import Any

import pytest

from autoeff.dashboard.allowance import limits_of, sliders_of
from autoeff.search.limits import check_reachable, parse_limit


def test_sliders_reach_from_the_least_to_dense(ground: Any, shown: Any) -> None:
    sliders = sliders_of(ground, shown.job.limits, "kl")
    assert sliders[0].name == "avg_bits"
    assert sliders[0].start == pytest.approx(3.5)
    for slider in sliders:
        assert slider.least < slider.most
        assert slider.least <= slider.start <= slider.most
        limit = parse_limit(limits_of([slider], {slider.name: slider.least})[0], ground.costs)
        check_reachable([limit], ground.costs)  # what a slider offers can be reached
        assert slider.most * slider.factor >= float(ground.costs.dense(slider.name))


def test_a_slider_at_its_end_limits_nothing(ground: Any) -> None:
    sliders = sliders_of(ground, (), "kl")
    assert limits_of(sliders, {slider.name: slider.most for slider in sliders}) == []
    assert limits_of(sliders, {}) == []
    weights = next(slider for slider in sliders if slider.name == "weight_bytes")
    assert limits_of([weights], {"weight_bytes": 2.5}) == ["weight_bytes<=2500000"]
