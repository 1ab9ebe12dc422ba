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
from autoeff.search.settings import Settings
from autoeff.search.storage.records import JobState
from autoeff.search.storage.store import Store

Spec = Callable[..., JobSpec]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", memory_cap_bytes=3 << 30)


@pytest.fixture
def spec(tiny_models: dict[str, Path], tmp_path: Path) -> Spec:
    text = tmp_path / "text.txt"
    text.write_text("the dog sat on the mat and the cat ate the hat while all the others went there again\n" * 60)

    def make(family: str = "llama", **fields: Any) -> JobSpec:
        job = {
            "model": str(tiny_models[family]),
            "data": {"source": str(text), "windows": 8, "length": 16},
            "eval_data": {"source": str(text), "windows": 8, "length": 16, "draw": "first"},
            "knobs": {"bits": {"group_size": 16}, "skip": {}},
            "limits": ["linear_bytes<=0.35x"],
            "budget": {"trials": 60},
        }
        return JobSpec.parse(job | fields)

    return make


def sequence(result: Result) -> list[tuple[Any, ...]]:
    return [(r["trial"], r["digest"], r["origin"], r["state"], json.dumps(r["measurements"], sort_keys=True)) for r in result.rows]


def test_a_search_beats_its_guests_within_the_limit(spec: Spec, settings: Settings, tmp_path: Path) -> None:
    result = start(spec(), tmp_path / "run", settings)
    assert result.exit_code == 0
    rows = {row["role"]: row for row in result.summary["rows"]}
    assert {"dense", "uniform", "additive", "random", "found"} <= set(rows)
    feasible = [row for row in result.summary["rows"] if row["feasible"] and row["held_out"] is not None]
    assert rows["found"]["held_out"] == min(row["held_out"] for row in feasible)
    assert result.found is not None
    bound = Fraction("0.35") * int(rows["dense"]["costs"]["linear_bytes"])
    assert max(row["costs"]["linear_bytes"] for row in feasible) <= bound
    assert result.summary["evaluations"] <= 60
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert (tmp_path / "run" / "front.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_of_the_front_recomputed_from_packed_tensors_are_the_reported_ones(spec: Spec, settings: Settings, tmp_path: Path) -> None:
    job = spec(limits=())
    result = start(job, tmp_path / "run", settings)
    evaluator = Evaluator(job.setup(settings.bank))
    assert len(result.front) >= 5
    for row in result.front:
        stored = sum(evaluator.stored_bytes(row["configuration"]).values())
        assert stored == row["measurements"]["linear_bytes"]["value"]


def test_the_same_job_makes_the_same_trials_without_evaluating_again(spec: Spec, settings: Settings, tmp_path: Path) -> None:
    first = start(spec(), tmp_path / "first", settings)
    second = start(spec(), tmp_path / "second", settings)
    assert sequence(first) == sequence(second)
    with Store.open(settings.database) as store:
        keys = [store.trial(second.job_id, row["trial"]).evaluation_id for row in second.rows]
        assert keys == [store.trial(first.job_id, row["trial"]).evaluation_id for row in first.rows]


@pytest.mark.parametrize("sampler", ["additive", "nsga2"])
def test_a_stopped_search_resumes_with_the_sequence_of_an_undisturbed_one(
    spec: Spec, settings: Settings, tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = spec(sampler=sampler, budget={"trials": 50})
    whole = start(job, tmp_path / "whole", Settings(home=tmp_path / "other"))
    evaluate, calls = Coordinator._evaluate, []

    def interrupted(self: Coordinator, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in (7, len(whole.rows) - 12):
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Coordinator, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(job, tmp_path / "run", settings)
    with Store.open(settings.database) as store:
        assert store.jobs()[0].state is JobState.PAUSED
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "run", settings)
    assert sequence(resume(tmp_path / "run", settings)) == sequence(whole)


def test_a_run_whose_values_would_differ_does_not_go_on(spec: Spec, settings: Settings, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(spec(), tmp_path / "run", settings, stop)
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


def test_a_runner_that_is_killed_while_it_completes_text_is_replaced(
    spec: Spec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, killed = RunnerProcess._exchange, []

    def murderous(self: RunnerProcess, message: Mapping[str, Any], *args: Any) -> Any:
        if message["kind"] == "complete" and not killed and self.pid is not None:
            killed.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return exchange(self, message, *args)

    monkeypatch.setattr(RunnerProcess, "_exchange", murderous)
    result = start(spec(budget={"trials": 40}), tmp_path / "run", settings)
    assert killed
    assert set(result.summary["completions"]) == {"prompt", "dense", "uniform", "found"}


def test_a_finished_run_is_only_reported_again(spec: Spec, settings: Settings, tmp_path: Path) -> None:
    result = start(spec(), tmp_path / "run", settings)
    (tmp_path / "run" / "report.html").unlink()
    again = resume(tmp_path / "run", settings)
    assert sequence(again) == sequence(result)
    assert (tmp_path / "run" / "report.html").exists()


def test_harmful_candidates_are_recorded_and_the_search_goes_on(spec: Spec, tmp_path: Path, third_party_knobs: Path) -> None:
    settings = Settings(home=tmp_path / "home", memory_cap_bytes=2 << 30, evaluation_timeout_s=3)
    one = {"include": ["model.layers.1.mlp:faulty"]}
    job = spec(knobs={"faulty": {}}, space=one, limits=(), objectives=["kl", "flops_per_token"], budget={"trials": 20})
    result = start(job, tmp_path / "run", settings)
    failures = {row["failure"]["class"] for row in result.rows if "failure" in row}
    assert failures == {"crash", "oom_host", "timeout", "invalid", "nan"}
    assert all(row["state"] in ("succeeded", "failed") for row in result.rows)


@pytest.mark.parametrize("name", ["hf-dense", "recipe"])
def test_an_export_measures_in_a_fresh_process_what_its_trial_measured(spec: Spec, settings: Settings, tmp_path: Path, name: str) -> None:
    result = start(spec("gpt2", budget={"trials": 40}), tmp_path / "run", settings)
    found = result.summary["found"]
    exported = export(tmp_path / "run", found, tmp_path / "out", name, settings)
    assert exported["measured"] == pytest.approx(exported["trial"], rel=1e-6)
    assert "recipe.json" in exported["files"]
    assert exported["linear_bytes"] == result.rows[found]["measurements"]["linear_bytes"]["value"]
    with pytest.raises(InputError, match="exists already"):
        export(tmp_path / "run", found, tmp_path / "out", name, settings)


def test_an_export_that_measures_otherwise_is_not_kept(
    spec: Spec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = start(spec(budget={"trials": 40}), tmp_path / "run", settings)
    monkeypatch.setattr("autoeff.search.exporter._TOLERANCE", (-1.0, 0.0))
    with pytest.raises(AutoeffError, match="nothing was exported"):
        export(tmp_path / "run", result.summary["found"], tmp_path / "out", "hf-dense", settings)
    assert not (tmp_path / "out").exists()


def test_a_limit_on_quality_that_nothing_keeps_ends_without_a_feasible_one(spec: Spec, settings: Settings, tmp_path: Path) -> None:
    result = start(spec(limits=["linear_bytes<=0.2x", "kl<=1e-9"], budget={"trials": 40}), tmp_path / "run", settings)
    assert result.exit_code == 3
    assert result.found is None
    assert result.summary["closest"] is not None


def test_plan_refuses_what_arithmetic_refutes(spec: Spec, settings: Settings) -> None:
    with pytest.raises(UnreachableLimit, match="least"):
        plan(spec(knobs={"bits": {}}, limits=["linear_bytes<=0.05x"]), settings)
    with pytest.raises(InputError, match="needs at least"):
        plan(spec(budget={"trials": 3}), settings)
    with pytest.raises(InputError, match="first objective"):
        plan(spec(objectives=["weight_bytes", "kl"]), settings)
    with pytest.raises(InputError, match="unknown sampler"):
        plan(spec(sampler="psychic"), settings)


def test_an_encoder_is_searched_by_the_cosine_of_its_embeddings(spec: Spec, settings: Settings, tmp_path: Path) -> None:
    result = start(spec("bert", budget={"trials": 40}), tmp_path / "run", settings)
    assert result.summary["quality"] == "damage_cosine"
    assert result.summary["completions"] is None
    assert result.exit_code == 0
