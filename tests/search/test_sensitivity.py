"""The damage table of runs and models: every level once, alone, the worst first."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from autoeff.errors import InputError
from autoeff.search.job import JobSpec
from autoeff.search.resolve import resolve
from autoeff.search.run import resume
from autoeff.search.runs import open_run
from autoeff.search.sensitivity import full_table, is_run, sensitivity, write_damage
from autoeff.search.standing import problem_of
from autoeff.search.storage.records import JobState


def test_a_model_is_measured_dense_and_level_by_level_only(searched: Any, tiny_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    heard: list[Any] = []
    found = full_table(tiny_job(), tmp_path / "run", searched.settings, heard.append)
    rows = searched.rows(tmp_path / "run")
    run = open_run(tmp_path / "run", searched.settings)
    with run.store as store:
        job = store.job(run.job_id)
        space = problem_of(job).space
    assert job.state is JobState.SUCCEEDED
    every = {(d.key, level) for d in space.decisions for level in d.levels[1:]}
    assert {(row["decision"], row["level"]) for row in found.rows} == every
    assert len(found.rows) == len(every) == len(rows) - 1
    assert [row["origin"] for row in rows] == ["dense"] + ["table"] * len(every)
    assert heard[-1].used == heard[-1].budget == len(rows)
    stored = {row["digest"]: row["measurements"]["kl"] for row in rows}
    for row in found.rows:
        measured = stored[space.configuration({row["decision"]: row["level"]}).digest]
        assert (row["damage"], row["spread"], row["method"]) == (measured["value"], measured["spread"], "measured")
    damages = [row["damage"] for row in found.rows]
    assert damages == sorted(damages, reverse=True)
    assert resume(tmp_path / "run", searched.settings).exit_code == 0
    assert searched.rows(tmp_path / "run") == rows
    assert resolve(tmp_path / "run", ["linear_bytes<=0.3x"], searched.settings).answer == "predicted"


def test_sums_are_over_blocks_and_over_sites(searched: Any) -> None:
    found = sensitivity(searched.loose, searched.settings)
    for sums in (found.sites, found.blocks):
        assert sum(item["damage"] for item in sums) == pytest.approx(sum(row["damage"] for row in found.rows))
        assert sum(item["decisions"] for item in sums) == len(found.rows)
    (chosen,) = [item for item in found.blocks if (item["knob"], item["block"], item["level"]) == ("bits", 1, 2)]
    in_block = [row["damage"] for row in found.rows if (row["knob"], row["block"], row["level"]) == ("bits", 1, 2)]
    assert chosen["damage"] == pytest.approx(sum(in_block))
    assert {item["site"] for item in found.sites} >= {"mlp.down_proj", "self_attn"}


def test_levels_that_a_cheap_table_left_out_are_marked(searched: Any) -> None:
    found = sensitivity(searched.loose, searched.settings)
    table = [row["trial"] for row in searched.rows(searched.loose) if row["origin"] == "table"]
    assert sorted(row["trial"] for row in found.rows if row["trial"] is not None) == table
    assert {row["method"] for row in found.rows if row["trial"] is None} <= {"estimated"}


def test_a_table_that_is_not_measured_is_refused(searched: Any) -> None:
    last = max(row["trial"] for row in searched.rows(searched.loose) if row["origin"] == "table")
    run = open_run(searched.loose, searched.settings)
    run.store.close()
    with closing(sqlite3.connect(searched.settings.home / "autoeff.db")) as database, database:
        database.execute("DELETE FROM trial WHERE job_id = ? AND number >= ?", (run.job_id, last))
    with pytest.raises(InputError, match=r"has measured \d+ of the \d+ levels of its damage table"):
        sensitivity(searched.loose, searched.settings)


def test_the_map_is_drawn_and_runs_are_told_from_models(searched: Any, tmp_path: Path) -> None:
    found = sensitivity(searched.loose, searched.settings)
    assert write_damage(found, tmp_path / "new" / "out", searched.settings).read_bytes().startswith(b"\x89PNG")
    assert is_run(str(searched.loose), searched.settings)
    assert is_run(found.job_id, searched.settings)
    assert not is_run("demo", searched.settings)
    assert not is_run(str(tmp_path), searched.settings)
