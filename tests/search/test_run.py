"""Whole searches on tiny models: what they find, store, resume, export, and how they fail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from autoeff.errors import AutoeffError, InputError, UnreachableLimit
from autoeff.evaluators.evaluator import Evaluator
from autoeff.search.coordinator import Coordinator, Progress
from autoeff.search.job import JobSpec
from autoeff.search.run import Result, export, plan, resume, start
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.sampler import known_samplers
from autoeff.search.settings import Settings
from autoeff.search.storage.records import JobState
from autoeff.search.storage.store import Store

Job = Callable[..., JobSpec]
LOOSE = "linear_bytes<=0.35x"  # of the fixture `searched`


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", memory_cap_bytes=3 << 30)


def sequence(result: Result) -> list[tuple[Any, ...]]:
    return [(r["trial"], r["digest"], r["origin"], r["state"], json.dumps(r["measurements"], sort_keys=True)) for r in result.rows]


def test_a_search_beats_its_guests_within_the_limit(searched: Any) -> None:
    result = resume(searched.loose, searched.settings)
    assert result.exit_code == 0
    rows = {row["role"]: row for row in result.summary["rows"]}
    assert {"dense", "uniform", "additive", "random", "found"} <= set(rows)
    feasible = [row for row in result.summary["rows"] if row["feasible"] and row["held_out"] is not None]
    assert rows["found"]["held_out"] == min(row["held_out"] for row in feasible)
    assert result.found is not None
    bound = Fraction("0.35") * int(rows["dense"]["costs"]["linear_bytes"])
    assert max(row["costs"]["linear_bytes"] for row in feasible) <= bound
    assert result.summary["evaluations"] <= 60
    assert (searched.loose / "report.html").stat().st_size > 1000
    assert (searched.loose / "front.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_of_the_front_recomputed_from_packed_tensors_are_the_reported_ones(tiny_job: Job, settings: Settings, tmp_path: Path) -> None:
    job = tiny_job()
    result = start(job, tmp_path / "run", settings)
    evaluator = Evaluator(job.setup(settings.bank))
    assert len(result.front) >= 5
    for row in result.front:
        stored = sum(evaluator.stored_bytes(row["configuration"]).values())
        assert stored == row["measurements"]["linear_bytes"]["value"]


def test_the_same_job_makes_the_same_trials_without_evaluating_again(tiny_job: Job, searched: Any, tmp_path: Path) -> None:
    first = resume(searched.loose, searched.settings)
    second = start(tiny_job(limits=[LOOSE]), tmp_path / "second", searched.settings)
    assert sequence(first) == sequence(second)
    with searched.opened() as store:
        keys = [store.trial(second.job_id, row["trial"]).evaluation_id for row in second.rows]
        assert keys == [store.trial(first.job_id, row["trial"]).evaluation_id for row in first.rows]


@pytest.mark.parametrize(
    ("sampler", "database"),
    [
        pytest.param(sampler, database, marks=[pytest.mark.slow] * ((sampler, database) != ("additive", "sqlite")))
        for sampler in sorted(known_samplers().keys() - {"none"})
        for database in ("sqlite", "postgresql")
    ],
)
def test_a_stopped_search_resumes_with_the_sequence_of_an_undisturbed_one(
    tiny_job: Job,
    searched: Any,
    settings: Settings,
    tmp_path: Path,
    sampler: str,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if database == "postgresql":
        url = request.getfixturevalue("servers").new_database(request.getfixturevalue("postgres"))
        settings = settings.model_copy(update={"database_url": url})
    job = tiny_job(limits=[LOOSE], sampler=sampler)
    whole = resume(searched.loose, searched.settings) if sampler == "additive" else start(job, tmp_path / "whole", searched.settings)
    evaluate, calls = Coordinator._propose, []

    def interrupted(self: Coordinator, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in (7, len(whole.rows) - 12):
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Coordinator, "_propose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(job, tmp_path / "run", settings)
    with Store.open(settings.database) as store:
        assert store.jobs()[0].state is JobState.PAUSED
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "run", settings)
    assert sequence(resume(tmp_path / "run", settings)) == sequence(whole)


def test_a_run_whose_values_would_differ_does_not_go_on(tiny_job: Job, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words\n" * 500)
    job = tiny_job(data={"source": str(tmp_path / "text.txt"), "windows": 8, "length": 16})

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(job, tmp_path / "run", settings, stop)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(
            InputError, match=rf"hardware changed from cpu x{threads} to cpu x{threads + 1}; set OMP_NUM_THREADS={threads}$"
        ):
            resume(tmp_path / "run", settings)
    finally:
        torch.set_num_threads(threads)
    (tmp_path / "text.txt").write_text("other words\n" * 500)
    with pytest.raises(InputError, match="search text changed"):
        resume(tmp_path / "run", settings)


@pytest.mark.slow
def test_a_runner_that_is_killed_while_it_completes_text_is_replaced(
    tiny_job: Job, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, killed = RunnerProcess._exchange, []

    def murderous(self: RunnerProcess, message: Mapping[str, Any], *args: Any) -> Any:
        if message["kind"] == "complete" and not killed and self.pid is not None:
            killed.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return exchange(self, message, *args)

    monkeypatch.setattr(RunnerProcess, "_exchange", murderous)
    result = start(tiny_job(limits=[LOOSE], budget={"trials": 40}), tmp_path / "run", settings)
    assert killed
    assert set(result.summary["completions"]) == {"prompt", "dense", "uniform", "found"}


def test_a_finished_run_is_only_reported_again(searched: Any) -> None:
    (searched.loose / "report.html").unlink()
    rows = searched.rows(searched.loose)
    resume(searched.loose, searched.settings)
    assert searched.rows(searched.loose) == rows
    assert (searched.loose / "report.html").exists()


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (["none", "segfault", "nan"], {"crash", "nan"}),
        pytest.param(
            ["none", "segfault", "hog", "loop", "raise", "nan"], {"crash", "oom_host", "timeout", "invalid", "nan"}, marks=pytest.mark.slow
        ),
    ],
)
def test_harmful_candidates_are_recorded_and_the_search_goes_on(
    tiny_job: Job, tmp_path: Path, third_party_knobs: Path, levels: list[str], expected: set[str]
) -> None:
    settings = Settings(home=tmp_path / "home", memory_cap_bytes=2 << 30, evaluation_timeout_s=4)
    one = {"include": ["model.layers.1.mlp:faulty"], "levels": {"*:faulty": levels}}
    job = tiny_job(knobs={"faulty": {}}, space=one, objectives=["kl", "flops_per_token"], budget={"trials": 20})
    result = start(job, tmp_path / "run", settings)
    failures = {row["failure"]["class"] for row in result.rows if "failure" in row}
    assert failures == expected
    assert all(row["state"] in ("succeeded", "failed") for row in result.rows)


@pytest.mark.parametrize("name", ["hf-dense", pytest.param("recipe", marks=pytest.mark.slow)])
def test_an_export_measures_in_a_fresh_process_what_its_trial_measured(searched: Any, tmp_path: Path, name: str) -> None:
    result = resume(searched.loose, searched.settings)
    found = result.summary["found"]
    exported = export(searched.loose, found, tmp_path / "out", name, searched.settings)
    assert exported["measured"] == pytest.approx(exported["trial"], rel=1e-6)
    assert "recipe.json" in exported["files"]
    assert exported["linear_bytes"] == result.rows[found]["measurements"]["linear_bytes"]["value"]
    with pytest.raises(InputError, match="exists already"):
        export(searched.loose, found, tmp_path / "out", name, searched.settings)


def test_an_export_that_measures_otherwise_is_not_kept(searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resume(searched.loose, searched.settings).summary["found"]
    monkeypatch.setattr("autoeff.search.exporter._TOLERANCE", {"decoded": (-1.0, 0.0)})
    with pytest.raises(AutoeffError, match="nothing was exported"):
        export(searched.loose, found, tmp_path / "out", "hf-dense", searched.settings)
    assert not (tmp_path / "out").exists()


def test_a_limit_on_quality_that_nothing_keeps_ends_without_a_feasible_one(tiny_job: Job, settings: Settings, tmp_path: Path) -> None:
    result = start(tiny_job(limits=["linear_bytes<=0.2x", "kl<=1e-9"], budget={"trials": 40}), tmp_path / "run", settings)
    assert result.exit_code == 3
    assert result.found is None
    assert result.summary["closest"] is not None


def test_plan_refuses_what_arithmetic_refutes(tiny_job: Job, settings: Settings) -> None:
    with pytest.raises(UnreachableLimit, match="least"):
        plan(tiny_job(knobs={"bits": {}}, limits=["linear_bytes<=0.05x"]), settings)
    with pytest.raises(InputError, match="needs at least"):
        plan(tiny_job(limits=[LOOSE], budget={"trials": 3}), settings)
    with pytest.raises(InputError, match="first objective"):
        plan(tiny_job(objectives=["weight_bytes", "kl"]), settings)
    with pytest.raises(InputError, match="unknown sampler"):
        plan(tiny_job(sampler="psychic"), settings)


def test_an_encoder_is_searched_by_the_cosine_of_its_embeddings(tiny_job: Job, settings: Settings, tmp_path: Path) -> None:
    result = start(tiny_job("bert", limits=[LOOSE], budget={"trials": 40}), tmp_path / "run", settings)
    assert result.summary["quality"] == "damage_cosine"
    assert result.summary["completions"] is None
    assert result.exit_code == 0
