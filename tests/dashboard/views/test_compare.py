"""Jobs beside each other."""

from __future__ import annotations

from typing import Any


def test_one_job_is_not_compared(view: Any, words: Any) -> None:
    page = view("compare")
    assert not page.exception
    assert "Choose two jobs" in words(page)
    assert not page.get("plotly_chart")
