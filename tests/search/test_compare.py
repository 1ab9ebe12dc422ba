"""Runs side by side: the best of each at every budget, what differs, and what must not be compared."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from autoeff.errors import InputError
from autoeff.search.compare import compare, write_fronts

LOOSE, TIGHT = "linear_bytes<=0.35x", "linear_bytes<=0.30x"  # of the fixture `searched`


def changed(searched: Any, folder: Path, **facts: Any) -> None:
    """Rewrites facts of the stored preflight of a run, by path such as `text.search.digest`."""
    job = json.loads((folder / "run.json").read_text())["job"]
    with closing(sqlite3.connect(searched.settings.home / "autoeff.db")) as database, database:
        for path, value in facts.items():
            database.execute(
                "UPDATE job SET preflight = json_set(preflight, ?, ?) WHERE id = ?", (f"$.{path.replace('__', '.')}", value, job)
            )


def test_the_best_of_each_run_at_every_budget(searched: Any) -> None:
    names = [str(searched.loose), str(searched.tight)]
    found = compare(names, searched.settings)
    assert [run["run"] for run in found.runs] == names
    assert (found.quality, found.cost) == ("kl", "linear_bytes")
    budgets = {budget["budget"]: budget for budget in found.budgets}
    assert {LOOSE, TIGHT, "linear_bytes of bits=4"} <= budgets.keys()
    bounds = [budget["bound"] for budget in found.budgets]
    assert bounds == sorted(bounds, reverse=True)
    for budget in found.budgets:
        values = []
        for name, folder, best in zip(names, (searched.loose, searched.tight), budget["best"], strict=True):
            windows = {row["measurements"]["kl"]["tokens"] for row in searched.rows(folder) if "kl" in row["measurements"]}
            within = [
                row["measurements"]["kl"]["value"]
                for row in searched.rows(folder)
                if "kl" in row["measurements"]
                and row["measurements"]["kl"]["tokens"] == max(windows)
                and row["measurements"]["linear_bytes"]["value"] <= budget["bound"]
            ]
            assert best["kl"] == min(within)
            values.append((best["kl"], name))
        winner = min(values)[1] if values[0][0] != values[1][0] else None
        assert budget["winner"] == winner


def test_only_settings_that_differ_are_named(searched: Any) -> None:
    found = compare([str(searched.loose), str(searched.tight)], searched.settings)
    assert found.settings == {"limits": [[LOOSE], [TIGHT]]}
    same = compare([str(searched.loose), str(searched.loose)], searched.settings)
    assert same.settings == {}
    assert same.decisions == {}
    assert {budget["winner"] for budget in same.budgets} == {None}


def test_a_front_has_no_dominated_trial(searched: Any, tmp_path: Path) -> None:
    found = compare([str(searched.loose), str(searched.tight)], searched.settings)
    for front in found.fronts:
        costs, values = [p["cost"] for p in front], [p["quality"] for p in front]
        assert len(front) > 3
        assert costs == sorted(set(costs))
        assert values == sorted(set(values), reverse=True)
    path = write_fronts(found, tmp_path / "out")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="exists already"):
        write_fronts(found, tmp_path / "out")


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"model__digest": "other"}, "the models differ"),
        ({"text__search__digest": "other"}, "the search texts differ"),
        ({"quality": "damage_cosine"}, "the quality measures differ .kl and damage_cosine"),
    ],
)
def test_what_means_different_things_is_not_compared(searched: Any, facts: dict[str, str], word: str) -> None:
    changed(searched, searched.tight, **facts)
    if "quality" in facts:
        with closing(sqlite3.connect(searched.settings.home / "autoeff.db")) as database, database:
            database.execute("UPDATE job SET result = NULL")
    with pytest.raises(InputError, match=word) as refused:
        compare([str(searched.loose), str(searched.tight)], searched.settings)
    assert "\n" not in str(refused.value)


def test_values_on_different_held_out_texts_are_left_out(searched: Any) -> None:
    names = [str(searched.loose), str(searched.tight)]
    assert all(run["found"]["kl_held_out"] is not None for run in compare(names, searched.settings).runs)
    changed(searched, searched.tight, text__held_out__digest="other")
    found = compare(names, searched.settings)
    assert all(run["found"]["kl_held_out"] is None for run in found.runs)
    assert "held-out texts differ" in found.notices[0]


def test_one_run_is_not_enough(searched: Any) -> None:
    with pytest.raises(InputError, match="at least two"):
        compare([str(searched.loose)], searched.settings)
