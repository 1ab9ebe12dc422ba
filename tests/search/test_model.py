"""Searches under a limit on latency, on a tiny model whose kernels are really timed; nothing is asserted about how long anything takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from autoeff.errors import InputError, UnreachableLimit
from autoeff.evaluators import latency_fit
from autoeff.kernels import timing
from autoeff.search.compare import compare
from autoeff.search.job import JobSpec
from autoeff.search.results import Results
from autoeff.search.run import plan, resume, start
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.settings import Settings
from autoeff.search.standing import cost_titles, problem_of
from autoeff.search.storage.store import Store

KNOBS = {"bits": {"group_size": 32}, "skip": {}}


@pytest.fixture
def job(tiny_job: Callable[..., JobSpec]) -> Callable[..., JobSpec]:
    """With levels that leave few operations to be timed."""

    def make(**fields: object) -> JobSpec:
        levels = {"levels": {"*:bits": [16, 8, 4]}, "exclude": ["*layers.2*"]}
        return tiny_job(**({"knobs": KNOBS, "context": 24, "space": levels, "budget": {"trials": 25}} | fields))

    return make


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(timing, "AIMED_S", 1e-4)
    monkeypatch.setattr(latency_fit, "_ROUNDS", 5)
    monkeypatch.setattr(latency_fit, "_TURN_S", 0.0)
    return Settings(home=tmp_path / "home", memory_cap_bytes=3 << 30)


def test_search_keeps_a_limit_on_measured_latency(
    job: Callable[..., JobSpec], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(limits=["decode_ms<=0.8x"], objectives=["quality", "decode_ms"])
    planned = plan(spec, settings)
    bound = planned.limits[0].bound
    assert bound == Fraction(4, 5) * planned.problem.cost_model.dense("decode_ms")
    result = start(spec, tmp_path / "run", settings)
    with Store.open(settings.database) as store:
        stored = store.job(result.job_id)
        trials = store.trials(result.job_id)
    problem = problem_of(stored)
    assert cost_titles(stored) == {"decode_ms": "decode_ms (predicted)"}
    for trial in trials:
        exact = problem.cost_model.exact("decode_ms", problem.space.indices(trial.configuration.levels))
        (predicted,) = [m for m in trial.measurements if m.name == "decode_ms"]
        assert (predicted.value, predicted.method, predicted.split) == (float(exact), "predicted", None)
        assert trial.feasible == (exact <= bound)
        assert trial.feasible or trial.origin in ("dense", "uniform", "table")
    assert result.found is not None
    assert result.found["measurements"]["decode_ms"]["value"] <= bound
    latency = result.summary["latency"]
    assert (latency["method"], latency["failure"]) == ("predicted", None)
    assert {"dense", "found"} <= {row["role"] for row in latency["rows"]}
    for row in latency["rows"]:
        times = row["times"]["decode_ms"]
        assert (times["predicted"]["method"], times["measured"]["method"]) == ("predicted", "measured")
        assert times["measured"]["hardware"]
        assert times["measured"]["value"] > 0
    page = (result.folder / "report.html").read_text()
    assert "predicted and measured" in page
    assert "decode_ms (predicted)" in page
    assert "decode_ms, ms (predicted)" in page  # the axis of the picture

    def refuse(*_: object) -> None:
        raise InputError("the model does not fit beside itself")

    with monkeypatch.context() as patch:
        patch.setattr(RunnerProcess, "ask", refuse)
        runner = planned.runner(settings, tmp_path / "log", lambda done, total: None)
        untimed = planned.closing(Results(planned.problem, trials), trials, runner)["latency"]
    assert untimed["failure"] == "the model does not fit beside itself"
    assert [row["trial"] for row in untimed["rows"]] == [row["trial"] for row in latency["rows"]]

    table = Path(stored.preflight["latency"]["table"])
    assert resume(result.folder, settings).summary == result.summary  # the times are found again
    measured = json.loads(table.read_text())
    first = next(iter(measured["entries"]))
    measured["entries"][first]["median_ns"] += 1000
    table.write_text(json.dumps(measured))
    with pytest.raises(InputError, match="the latency table changed"):
        resume(result.folder, settings)


def test_nothing_is_timed_that_nobody_asks_for(job: Callable[..., JobSpec], settings: Settings) -> None:
    planned = plan(job(limits=["avg_bits<=6"]), settings)
    assert "decode_ms" not in planned.dense
    assert "latency" not in planned.preflight
    assert not (settings.home / "latency").exists()
    with pytest.raises(InputError, match="no objective and no limit is on decode_ms or prefill_ms"):
        plan(job(target="H200"), settings)


@pytest.mark.slow
def test_milliseconds_of_different_devices_are_not_compared(job: Callable[..., JobSpec], settings: Settings, tmp_path: Path) -> None:
    for target in ("H200", "L4"):
        start(job(limits=["decode_ms<=0.9x"], target=target), tmp_path / target, settings)
    found = compare([str(tmp_path / target) for target in ("H200", "L4")], settings)
    assert found.cost == "weight_bytes"
    assert any("not timed by one latency table" in notice for notice in found.notices)
    assert found.budgets
    assert not any("decode_ms" in budget["budget"] for budget in found.budgets)
    twice = compare([str(tmp_path / "H200")] * 2, settings)
    assert (twice.cost, twice.method, found.method) == ("decode_ms", "estimated", None)
    assert any("decode_ms" in budget["budget"] for budget in twice.budgets)


def test_latency_of_an_absent_gpu_is_estimated_everywhere(job: Callable[..., JobSpec], settings: Settings) -> None:
    spec = job(limits=["decode_ms<=1s", "prefill_ms<=0.99x"], target="H200", batch=4, context=64)
    planned = plan(spec, settings)
    assert planned.preflight["latency"]["device"] == "H200"
    assert 0 < planned.least["decode_ms"] < planned.dense["decode_ms"]
    measured = {m.name: m.method for m in planned.problem.cost_model.measurements([0] * len(planned.space.decisions))}
    assert {name for name, method in measured.items() if method == "estimated"} == {"decode_ms", "prefill_ms"}
    assert any("estimated" in notice for notice in planned.notices)
    assert plan(spec, settings, "cpu").preflight["latency"] == planned.preflight["latency"]
    with pytest.raises(InputError, match="of the workers of queue cpu is not measured yet"):
        plan(job(limits=["decode_ms<=1s"]), settings, "cpu")
    with pytest.raises(UnreachableLimit, match=r"the least decode_ms of this space is 0\.\d+us"):
        plan(job(limits=["decode_ms<=0.0001us"], target="H200"), settings)
