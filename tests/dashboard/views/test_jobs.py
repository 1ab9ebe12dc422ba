"""The list of jobs."""

from __future__ import annotations

from typing import Any


def test_a_finished_search_is_listed_with_its_best(view: Any, plant: Any, shown: Any) -> None:
    page = view("jobs")
    assert not page.exception
    (row,) = page.dataframe[0].value.to_dict("records")
    assert (row["state"], row["model"], row["job"], row["progress"]) == ("succeeded", "demo", plant.job, 1.0)
    assert row["best"].startswith("kl 0.0")
    assert str(shown.job.budget) in row["evaluations"]


def test_a_filter_that_nothing_passes_says_so(view: Any, words: Any) -> None:
    page = view("jobs")
    page.button_group[0].set_value(["failed"]).run()
    assert not page.dataframe
    assert "No job is in these states" in words(page)


def test_who_has_no_jobs_is_told_what_to_do(view: Any, words: Any) -> None:
    page = view("jobs", "stranger")
    assert "No searches yet" in words(page)
    assert "autoeff search demo" in words(page)
    assert [button.label for button in page.button] == ["Submit a search"]
