"""The page of one job."""

from __future__ import annotations

from typing import Any

import pytest


def test_a_finished_search_shows_what_it_found(view: Any, words: Any, shown: Any) -> None:
    page = view("job")
    assert not page.exception
    values = {metric.label.replace("\\", ""): metric.value for metric in page.metric}
    assert f"{shown.job.trials:,} trials" in words(page)
    assert values["kl, nats/token"] == f"{shown.front.best_quality:#.4g}".removesuffix(".")
    assert f"Found: trial {shown.front.best}" in words(page)
    assert page.query_params["job"] in (shown.job.job, [shown.job.job])
    frame = page.dataframe[0].value
    assert list(frame.loc[frame["limits"] == "kept", "configuration"]) == ["found", "additive optimum", "best of random"]
    assert [button.label for button in page.button] == ["Clone", "Open it"]


@pytest.mark.parametrize("tab", ["Damage map", "Importance", "Job file"])
def test_a_tab_is_drawn_once_it_is_opened(view: Any, words: Any, tab: str) -> None:
    page = view("job")
    assert not page.get("plotly_chart")
    page.session_state["job_tab"] = tab
    page.run()
    assert not page.exception
    assert not page.error
    if tab == "Job file":
        assert "model: demo" in words(page)
    else:
        assert len(page.get("plotly_chart")) == {"Importance": 2, "Damage map": 3}[tab]


def test_trials_are_shown_in_pages_and_by_filter(view: Any, client: Any, shown: Any) -> None:
    page = view("job")
    page.session_state["job_tab"] = "Trials"
    page.run()
    assert list(page.dataframe[0].value["trial"]) == list(range(50))
    page.button(key="trials_next").click().run()
    assert list(page.dataframe[0].value["trial"]) == list(range(50, 100))
    page.button(key="trials_back").click().run()
    assert page.dataframe[0].value["trial"].iloc[0] == 0
    page.selectbox(key="trial_origin").set_value("uniform").run()
    labels = dict(zip(page.dataframe[0].value["trial"], page.dataframe[0].value["label"], strict=True))
    assert shown.uniform.items() <= labels.items()


def test_a_job_is_steered(view: Any, plant: Any, twins: tuple[str, str, str]) -> None:
    page = view("job", "carol", job=twins[1])
    assert not page.exception
    assert {"Resume", "Retry failed", "Clone"} <= {button.label for button in page.button}
    page.button(key="steer_retry_failed").click().run()
    assert not page.exception
    assert [toast.value for toast in page.toast] == ["Failed trials are tried again."]
    client = plant.visitor("carol").client
    job = client.job(twins[1])
    assert (job.state, job.failed) == ("pending", 0)
    assert client.trial(twins[1], 150).state == "queued"
    assert "Retry failed" not in {button.label for button in page.button}

    page.button(key="steer_pause").click().run()
    assert client.job(twins[1]).state == "paused"
    page.button(key="steer_resume").click().run()
    assert client.job(twins[1]).state == "pending"
    assert not page.exception


def test_a_job_that_is_not_there_is_said_to_be_gone(view: Any, words: Any) -> None:
    page = view("job", job="0" * 12)
    assert not page.exception
    assert "not there any more" in words(page)
    assert [button.label for button in page.button] == ["Back to the jobs"]


def test_somebody_elses_job_is_not_there_either(view: Any, words: Any, plant: Any) -> None:
    page = view("job", "stranger", job=plant.job)
    assert "not there any more" in words(page)
    assert "avg_bits" not in words(page)
