"""Searches of the user's own code, which have no layers and whose costs are not known ahead: what of every view is left for them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import autoeff

SPACE = {"depth": autoeff.choice(4, 1, 2, 3, 5, 6), "act": autoeff.choice("relu", "tanh")}


def build(configuration: dict[str, Any]) -> dict[str, Any]:
    return configuration


def error(candidate: dict[str, Any]) -> float:
    return 1 / int(candidate["depth"]) - 0.1 * (candidate["act"] == "tanh")


def size(candidate: dict[str, Any]) -> int:
    return 10 * int(candidate["depth"])


@pytest.fixture(scope="module")
def job(plant: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Dan's, whose best is four layers and tanh."""
    folder: Path = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOEFF_HOME", str(plant.home))
        patch.chdir(folder)
        autoeff.run_search(build=build, space=SPACE, metrics=[error, size], objectives=["error", "size"], limits=["size<=40"], trials=12)
    with closing(sqlite3.connect(plant.home / "autoeff.db")) as base, base:
        ((found,),) = base.execute("UPDATE job SET owner = 'dan' WHERE spec ->> 'kind' = 'own' RETURNING id").fetchall()
    return str(found)


def test_what_was_found_is_shown(view: Any, words: Any, job: str) -> None:
    page = view("jobs", "dan")
    assert not page.exception
    assert page.dataframe[0].value["job"].tolist() == [job]
    page = view("job", "dan")
    assert not page.exception
    assert "Found: trial" in words(page)
    assert "12 of 12" in words(page)


@pytest.mark.parametrize(("tab", "said"), [("Damage map", "has no layers"), ("Importance", "From 1"), ("Job file", "depth")])
def test_a_tab_says_what_there_is(view: Any, words: Any, job: str, tab: str, said: str) -> None:
    page = view("job", "dan", job=job)
    page.session_state["job_tab"] = tab
    page.run()
    assert not page.exception
    assert said in words(page)


def test_a_configuration_is_a_list_and_a_budget_has_no_answer(view: Any, words: Any, job: str) -> None:
    page = view("configuration", "dan", job=job)
    assert not page.exception
    (choices,) = (one.value for one in page.dataframe if "choice" in one.value)
    assert dict(zip(choices["choice"], choices["value"], strict=True)) == {"depth": "4", "act": "tanh"}
    page = view("budget", "dan", job=job)
    assert not page.exception
    assert "own code" in words(page)
