"""The page of one configuration."""

from __future__ import annotations

import re
from typing import Any

import pytest


def test_the_best_stands_beside_the_nearest_uniform_level(view: Any, shown: Any, ground: Any) -> None:
    page = view("configuration")
    assert not page.exception
    assert page.selectbox(key="trial_picked").value == shown.front.best
    (frame,) = (one.value for one in page.dataframe if "measurement" in one.value)
    assert len([column for column in frame.columns if column.startswith("beside")]) == 1
    assert frame[frame["measurement"] == "kl"]["difference"].iloc[0].startswith("-")
    assert page.metric[0].delta == f"{frame['difference'].iloc[0]} against trial 7"
    (earned,) = (one.value for one in page.dataframe if "earned" in one.value)
    rows = shown.result["attribution"]["rows"]
    assert list(zip(earned["knob"], map(float, earned["earned"]), strict=True)) == [
        (row["knob"], pytest.approx(row["earned"], rel=1e-2)) for row in rows
    ]
    (saved,) = (one.value for one in page.dataframe if "kl alone" in one.value)
    trial = {name: measured.value for name, measured in shown.best.measurements.items()}
    dense = float(ground.costs.dense("weight_bytes"))
    assert sum(saved["weight_bytes, kB"]) == pytest.approx((dense - trial["weight_bytes"]) / 1e3)
    assert len(page.get("plotly_chart")) == 3  # two maps and the blocks
    assert any(re.fullmatch(rf"What changed: \d+ of {len(ground.space.decisions)} decisions", one.label) for one in page.expander)


def test_another_trial_is_named_by_its_number(view: Any) -> None:
    page = view("configuration", trial=3)
    assert page.selectbox(key="trial_picked").value == 3
    page.number_input(key="trial_number").set_value(0).run()
    assert page.query_params["trial"] in ("0", ["0"])
    assert any("Every decision is dense" in text.value for text in page.markdown)


def test_a_key_that_reads_only_exports_nothing(view: Any) -> None:
    assert "Export" in [button.label for button in view("configuration").button]
    assert "Export" not in [button.label for button in view("configuration", "reader").button]
