"""Jobs beside each other."""

from __future__ import annotations

from typing import Any


def test_one_job_is_not_compared(view: Any, words: Any) -> None:
    page = view("compare")
    assert not page.exception
    assert "Choose two jobs" in words(page)
    assert not page.get("plotly_chart")


def test_what_was_found_at_common_budgets_and_what_differs(view: Any, twins: tuple[str, str, str]) -> None:
    page = view("compare", "carol")
    page.multiselect[0].set_value(list(twins[:2])).run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == 1
    budgets, settings, levels = (frame.value for frame in page.dataframe)
    names = [f"{twins[0][:6]} · avg_bits<=3.5, kv_bytes<=0.5x", f"{twins[1][:6]} · avg_bits<=4"]
    assert names == [column for column in settings.columns if column != "setting"]
    rows = {row["setting"]: [row[name] for name in names] for row in settings.to_dict("records")}
    assert rows == {"seed": ["0", "7"], "limits": ["avg_bits<=3.5, kv_bytes<=0.5x", "avg_bits<=4"]}
    best = {row["within"]: [row[name] for name in names] for row in budgets.to_dict("records")}
    assert best["avg_bits of bits=3"][0] != best["avg_bits of bits=3"][1]  # the search went on
    assert set(budgets["best"]) <= {twins[0][:6], twins[1][:6], "equal"}
    assert len(levels) > 0


def test_what_does_not_compare_is_said(view: Any, words: Any, twins: tuple[str, str, str]) -> None:
    page = view("compare", "carol")
    page.multiselect[0].set_value([twins[0], twins[2]]).run()
    assert not page.exception
    assert "the search texts differ" in words(page)
