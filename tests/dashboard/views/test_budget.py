"""The sliders."""

from __future__ import annotations

from typing import Any

import pytest


def test_moving_a_slider_answers_another_budget(view: Any, words: Any) -> None:
    page = view("budget")
    assert not page.exception
    assert page.slider[0].value == pytest.approx(3.5)
    values = {metric.label: metric.value for metric in page.metric}
    before = float(values["expected kl"].split()[0])
    page.slider[0].set_value(5.0).run()
    after = {metric.label: metric.value for metric in page.metric}
    assert float(after["expected kl"].split()[0]) < before
    assert {"Configuration as JSON"} <= {button.label for button in page.get("download_button")}


def test_a_budget_that_limits_nothing_is_said_to(view: Any, words: Any) -> None:
    page = view("budget")
    for slider in page.slider:
        slider.set_value(slider.max)
    page.run()
    assert "nothing is limited" in words(page)


def test_an_impossible_budget_is_a_sentence(view: Any) -> None:
    page = view("budget")
    slider = next(slider for slider in page.slider if slider.label.startswith("weight"))
    page.slider[0].set_value(page.slider[0].min)
    slider.set_value(slider.min).run()
    assert not page.exception
    assert not page.error
