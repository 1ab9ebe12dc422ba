"""Fifty hostile names: on every page they are text. `test_journey.py` looks at the same in a browser."""

from __future__ import annotations

import re
from typing import Any

import pytest

from autoeff.dashboard.words import markdown, plain

MARKED = ("title", "header", "subheader", "markdown", "caption", "error", "warning", "info", "success")
"""Elements that read Markdown."""


@pytest.fixture(scope="module")
def jobs(plant: Any, hostile_names: list[str], add_jobs: Any) -> list[str]:
    found: list[str] = add_jobs(plant.home / "autoeff.db", plant.job, hostile_names)
    return found


def texts(page: Any) -> list[str]:
    return [str(element.value) for kind in MARKED for element in getattr(page, kind)] + [one.label for one in [*page.metric, *page.button]]


def check(page: Any, name: str) -> None:
    assert not page.exception
    raw = plain(name, 60).strip()
    if raw and markdown(raw) != raw:
        assert not [text for text in texts(page) if re.search(r"(?<!\\)" + re.escape(raw), text)], name


def test_lists_show_every_name_as_text(view: Any, jobs: list[str], hostile_names: list[str]) -> None:
    page = view("jobs", "eve")
    assert not page.exception
    page.number_input(key="jobs_page").set_value(2).run()
    shown = page.dataframe[0].value
    assert set(shown["job"]) <= {*jobs}
    names = dict(zip(jobs, hostile_names, strict=True))
    for row in shown.to_dict("records"):
        assert row["model"] == plain(row["model"], 60)  # nothing invisible is in it
        assert len(row["model"]) <= 60
        check(page, names[row["job"]])


@pytest.mark.parametrize("number", [2, 20, 48])
def test_the_page_of_a_job_shows_its_name_as_text(view: Any, jobs: list[str], hostile_names: list[str], number: int) -> None:
    page = view("job", "eve", job=jobs[number])
    check(page, hostile_names[number])
    assert page.error  # the job's own, whose text is the name
    assert any("ended before anything was measured" in text for text in texts(page))


def test_keys_with_such_names_are_listed(view: Any, client: Any, hostile_names: list[str]) -> None:
    made = [client.make_key(name[:80], "local", ["jobs:read"]).key for name in hostile_names if name.strip() and name[:80].isprintable()][
        :20
    ]
    page = view("keys")
    assert not page.exception
    assert {*made} <= {*page.dataframe[0].value["key"]}
    for name in hostile_names:
        check(page, name[:80])
    for key in made:
        client.revoke_key(key)
