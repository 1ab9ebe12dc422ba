"""The sliders."""

from __future__ import annotations

from typing import Any

import pytest


def test_moving_sliders_answers_another_budget_or_says_why_not(view: Any, words: Any) -> None:
    page = view("budget")
    assert not page.exception
    assert page.slider[0].value == pytest.approx(3.5)
    values = {metric.label.replace("\\", ""): metric.value for metric in page.metric}
    before = float(values["expected kl, nats/token"].split()[0])
    page.slider[0].set_value(5.0).run()
    after = {metric.label.replace("\\", ""): metric.value for metric in page.metric}
    assert float(after["expected kl, nats/token"].split()[0]) < before
    assert {"Configuration as JSON"} <= {button.label for button in page.get("download_button")}

    for slider in page.slider:
        slider.set_value(slider.max)
    page.run()
    assert "nothing is limited" in words(page)

    weights = next(slider for slider in page.slider if slider.label.startswith("weight"))
    page.slider[0].set_value(page.slider[0].min)
    weights.set_value(weights.min).run()  # the least of both, which may be out of reach together: a sentence, and no fault
    assert not page.exception
    assert not page.error
