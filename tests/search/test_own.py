"""The user's own code under the engine: what is found, what fails, what is stored and resumed."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import autoeff
from autoeff.cli import main
from autoeff.errors import InputError
from autoeff.search.coordinator import Coordinator
from autoeff.search.pareto import non_dominated
from autoeff.search.run import Result
from autoeff.search.settings import Settings
from autoeff.search.storage.records import JobState
from autoeff.search.storage.store import Store

SPACE = {"depth": autoeff.choice(2, 1, 3), "width": autoeff.choice(8, 2, 4, 16), "act": autoeff.choice("relu", "tanh", "none")}
GRID = {"a": autoeff.choice(0, 1, 2, 3, 4), "b": autoeff.choice(0, 1, 2, 3, 4, 5)}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOEFF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored() -> Store:
    return Store.open(Settings.read().database)


def build(configuration: dict[str, Any]) -> nn.Module:
    """A classifier of points inside a circle, trained for some steps."""
    points = torch.rand(128, 2) * 2 - 1
    inside = (points.square().sum(1) < 0.5).long()
    acts = {"relu": nn.ReLU, "tanh": nn.Tanh, "none": nn.Identity}
    layers: list[nn.Module] = []
    width = 2
    for _ in range(configuration["depth"]):
        layers += [nn.Linear(width, configuration["width"]), acts[configuration["act"]]()]
        width = configuration["width"]
    model = nn.Sequential(*layers, nn.Linear(width, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(points), inside)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def accuracy(model: nn.Module) -> torch.Tensor:
    points = torch.rand(512, 2) * 2 - 1
    inside = (points.square().sum(1) < 0.5).long()
    return (model(points).argmax(1) == inside).float().mean()


def size(model: nn.Module) -> dict[str, float]:
    return {"parameters": sum(p.numel() for p in model.parameters()), "layers": len(list(model.children()))}


def pair(configuration: dict[str, Any]) -> tuple[int, int]:
    return configuration["a"], configuration["b"]


def gain(candidate: tuple[int, int]) -> float:
    a, b = candidate
    return [3.0, 1.0, 4.0, 1.5, 5.0][a] * (b + 1) - b * b


def price(candidate: tuple[int, int]) -> int:
    return 7 * candidate[0] + candidate[1] ** 2 + 1


def search(**fields: Any) -> Result:
    call: dict[str, Any] = {
        "build": pair, "space": GRID, "metrics": [gain, price], "objectives": ["-gain", "price"], "trials": 12, "out": "run",
    }  # fmt: skip
    return autoeff.run_search(**(call | fields))


def sequence(result: Result) -> list[tuple[Any, ...]]:
    return [(r["trial"], r["digest"], r["origin"], r["state"], json.dumps(r["measurements"], sort_keys=True)) for r in result.rows]


def truth() -> dict[tuple[int, int], tuple[float, int]]:
    return {x: (gain(x), price(x)) for x in itertools.product(range(5), range(6))}


def test_a_module_of_the_users_own_is_searched_and_reported(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = autoeff.run_search(
        build=build, space=SPACE, metrics=[accuracy, size], objectives=["-accuracy", "parameters"], limits=["parameters<=120"], trials=15,
        out="run",
    )  # fmt: skip
    assert result.exit_code == 0
    assert [row["origin"] for row in result.rows[:5]] == ["dense", *["random"] * 3, "searched"]
    assert result.rows[0]["configuration"] == {"act": "relu", "depth": 2, "width": 8}
    assert result.rows[0]["measurements"]["parameters"] == {"value": 2 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2, "unit": "", "method": "measured"}
    assert result.found is not None
    within = [r for r in result.rows if "failure" not in r and r["measurements"]["parameters"]["value"] <= 120]
    assert result.found["measurements"]["accuracy"]["value"] == max(r["measurements"]["accuracy"]["value"] for r in within)
    assert result.found["measurements"]["layers"]["value"] > 0
    page = (machine / "run" / "report.html").read_text()
    assert "largest accuracy" in page
    assert "least parameters" in page
    assert (machine / "run" / "front.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for line in ("ls run", "ls", "show run 0", "pareto run", "best run", "status run", "compare run run"):
        assert main(line.split()) == 0, line
        assert main([*line.split(), "--format", "json"]) == 0, line
    assert "accuracy" in capsys.readouterr().out
    for line in ("resume run", "resolve run --limit parameters<=3", "sensitivity run", "export run best out"):
        assert main(line.split()) == 2, line
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 4
    assert "resume=True" in error


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gp", "random"))])
def test_all_configurations_of_a_small_space_give_the_true_front(sampler: str) -> None:
    result = search(trials=60, sampler=sampler)
    assert len({row["digest"] for row in result.rows}) == len(result.rows) == 30  # none twice, and the search ends by itself
    points = list(truth().values())
    front = {(r["measurements"]["gain"]["value"], r["measurements"]["price"]["value"]) for r in result.front}
    assert front == {points[i] for i in non_dominated([(-g, p) for g, p in points])}


@pytest.mark.parametrize(
    ("sampler", "limits"),
    [("tpe", ["price<=30"]), ("nsga2", ["price<=30", "gain>=4"]), pytest.param("gp", ["price<=30"], marks=pytest.mark.slow)],
)
def test_limits_hold_for_what_is_found_and_samplers_learn_them(sampler: str, limits: list[str]) -> None:
    space = {"a": autoeff.choice(*range(5)), "b": autoeff.choice(*range(6)), "c": autoeff.choice(*range(20))}

    def three(configuration: dict[str, Any]) -> dict[str, Any]:
        return configuration

    def gain(c: dict[str, Any]) -> float:
        return c["a"] + c["b"] + c["c"]

    def price(c: dict[str, Any]) -> float:
        return 3 * c["a"] + 2 * c["b"] + 4 * c["c"]

    trials = 30 if sampler == "gp" else 60
    result = search(build=three, space=space, metrics=[gain, price], objectives=["-gain"], limits=limits, sampler=sampler, trials=trials)
    assert result.found is not None
    assert result.found["measurements"]["price"]["value"] <= 30
    assert result.summary["rows"][-1]["feasible"]

    def share(rows: list[Any]) -> float:
        return sum(r["measurements"]["price"]["value"] <= 30 for r in rows) / len(rows)

    asked = [row for row in result.rows if row["origin"] == "searched"]
    if sampler != "nsga2":  # whose first population of 50 is random
        assert share(asked[len(asked) // 2 :]) > 0.4  # a quarter of the space keeps it


def test_a_limit_that_nothing_keeps_ends_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    result = search(limits=["price<=0.5"], trials=60)
    assert result.exit_code == 3
    assert result.found is None
    closest = result.rows[result.summary["closest"]]
    assert closest["measurements"]["price"]["value"] == 1
    assert main(["best", "run"]) == 3


def test_failures_are_recorded_with_their_traceback_and_the_search_goes_on(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOEFF_EVALUATION_TIMEOUT_S", "8")
    monkeypatch.setenv("AUTOEFF_MEMORY_CAP_BYTES", str(psutil.Process().memory_info().rss + (256 << 20)))

    def harm(candidate: str) -> float:
        match candidate:
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "raise":
                print("about to divide")  # noqa: T201
                return 1 / 0
            case "nan":
                return float("nan")
            case "hang":
                time.sleep(60)
            case "memory":
                held = bytearray(1 << 30)  # a fork does not count the pages of libraries that it has not touched
                held[::4096] = bytes(len(held) // 4096)
                time.sleep(60)
            case "flood":
                while True:
                    print("flood" * 10_000)  # noqa: T201
            case "exit":
                os._exit(7)
            case "quit":
                raise SystemExit(3)
            case "words":
                return "good"  # type: ignore[return-value]
            case "builtin":
                return {"harm": 1.0, "kl": 2.0}  # type: ignore[return-value]
            case "missing":
                return {"other": 1.0}  # type: ignore[return-value]
        return 0.5

    kinds = ("fine", "segfault", "raise", "nan", "hang", "memory", "flood", "exit", "quit", "words", "builtin", "missing", "good")
    result = search(build=lambda c: c["kind"], space={"kind": autoeff.choice(*kinds)}, metrics=[harm], objectives=["harm"], trials=40)
    found = {row["configuration"]["kind"]: row.get("failure", {"class": "", "message": ""}) for row in result.rows}
    assert {kind: failure["class"] for kind, failure in found.items()} == {
        "fine": "", "good": "", "segfault": "crash", "raise": "invalid", "nan": "nan", "hang": "timeout", "memory": "oom_host",
        "flood": "invalid", "exit": "crash", "quit": "invalid", "words": "invalid", "builtin": "invalid", "missing": "invalid",
    }  # fmt: skip
    assert found["raise"]["message"] == "ZeroDivisionError: division by zero"
    assert "no metric gave 'harm'" in found["missing"]["message"]
    assert result.exit_code == 0
    assert result.found is not None
    failed = {row["configuration"]["kind"]: row["trial"] for row in result.rows}
    capsys.readouterr()
    assert main(["show", "run", str(failed["raise"])]) == 0
    log = capsys.readouterr().out
    assert re.search(r"about to divide\nTraceback .*in harm.*1 / 0", log, re.DOTALL)
    assert main(["show", "run", str(failed["segfault"])]) == 0
    assert "Segmentation fault" in capsys.readouterr().out
    assert "division by zero" in (machine / "run" / "report.html").read_text()


def test_a_process_that_a_candidate_started_ends_with_it(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOEFF_EVALUATION_TIMEOUT_S", "20")
    left = machine / "left"

    def start(candidate: tuple[int, int]) -> float:
        if (pid := os.fork()) == 0:  # holds the pipe open
            time.sleep(60)
            os._exit(0)
        with left.open("a") as file:
            file.write(f"{pid}\n")
        if candidate[0] == 1:
            os._exit(1)
        return float(candidate[0])

    started = time.monotonic()
    result = search(space={"a": autoeff.choice(0, 1), "b": autoeff.choice(0, 1)}, metrics=[start], objectives=["start"], trials=4)
    assert time.monotonic() - started < 15
    assert sorted(row.get("failure", {"class": ""})["class"] for row in result.rows) == ["", "", "crash", "crash"]
    time.sleep(0.2)
    for pid in map(int, left.read_text().split()):
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("fields", [{}, {"objectives": ["-gain"], "limits": ["price<=20"]}, {"sampler": "gp"}])
def test_a_stopped_search_goes_on_as_an_undisturbed_one(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(out="whole", trials=18, **fields)
    evaluate, calls = Coordinator._propose, []

    def interrupted(self: Coordinator, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 14):  # the second time while the stored trials have just been passed
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Coordinator, "_propose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(out="run", trials=18, **fields)
    with stored() as store:
        assert store.jobs()[0].state is JobState.PAUSED
    with pytest.raises(KeyboardInterrupt):
        search(out="run", trials=18, resume=True, **fields)
    result = search(out="run", trials=18, resume=True, **fields)
    assert sequence(result) == sequence(whole)
    assert sequence(search(out="run", trials=18, resume=True, **fields)) == sequence(whole)  # finished: only reported again


def test_stored_trials_answer_instead_of_being_evaluated(machine: Path, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def counted(candidate: tuple[int, int]) -> float:
        with (machine / "calls").open("a") as file:
            file.write("x")
        if (machine / "stop").exists():
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(5)
        return gain(candidate)

    fields: dict[str, Any] = {"metrics": {"gain": counted, "price": price}}
    (machine / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        search(**fields)
    (machine / "stop").unlink()
    first = search(resume=True, **fields)
    assert len((machine / "calls").read_text()) == len(first.rows) + 1  # the one that was under way is evaluated again
    search(resume=True, **fields)
    assert len((machine / "calls").read_text()) == len(first.rows) + 1


def test_another_job_does_not_answer_for_this_one() -> None:
    first = search(out="first")
    second = search(out="second", metrics={"gain": lambda c: gain(c) + 100, "price": price})
    assert first.rows[0]["measurements"]["gain"]["value"] + 100 == second.rows[0]["measurements"]["gain"]["value"]


def test_resume_refuses_another_search_in_one_line() -> None:
    search(trials=5)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"space": {**GRID, "c": autoeff.choice(1, 2)}}, "space changed from"),
        ({"space": dict(reversed(GRID.items()))}, "space changed from"),
        ({"objectives": ["-gain"], "sampler": "nsga2"}, "objectives changed from"),
        ({"seed": 1}, "seed changed from 0 to 1"),
        ({"trials": 13}, "trials changed from 5 to 13"),
        ({"limits": ["price<=3"]}, "limits changed from"),
        ({"metrics": [gain, price, max]}, "metrics changed from"),
        ({"build": truth}, "build changed from"),
        ({"out": None}, "name it"),
        ({"out": "nothing"}, "nothing"),
    ]
    for fields, message in refused:
        with pytest.raises(InputError, match=re.escape(message)) as error:
            search(**({"trials": 5, "resume": True} | fields))
        assert "\n" not in str(error.value)
    assert search(trials=5, resume=True, timeout=60).exit_code == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"a": [1, 2]}}, "autoeff.choice"),
        ({"objectives": []}, "objectives are empty"),
        ({"objectives": "gain"}, "a list is needed"),
        ({"objectives": ["gain", "-gain"]}, "each may stand once"),
        ({"objectives": ["kl"]}, "built-in measurement"),
        ({"metrics": []}, "at least one"),
        ({"metrics": [lambda c: 1]}, "name it"),
        ({"metrics": [3]}, "is a int"),
        ({"metrics": [gain, gain]}, "each name once"),
        ({"limits": ["price<5"]}, "price<=5"),
        ({"limits": ["price"]}, "cannot read the limit"),
        ({"trials": 0}, "at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"sampler": "additive"}, "costs that are known before an evaluation"),
        ({"sampler": "psychic"}, "unknown sampler"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_a_run_is_made(machine: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        search(**fields)
    assert "\n" not in str(error.value)
    assert not (machine / "run").exists()


def test_a_name_that_no_metric_gives_stops_the_search_at_the_reference() -> None:
    with pytest.raises(InputError, match="no metric gave 'cost', which objectives or limits name; there were gain, price"):
        search(objectives=["-gain", "cost"])


@pytest.mark.parametrize("values", [(), (1,), (1, 1), (1, True), (1, None), (0.5, float("nan")), (1, [2])])
def test_choice_refuses_what_is_no_choice(values: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="choice"):
        autoeff.choice(*values)


def test_runs_of_the_same_code_are_compared_and_others_refused() -> None:
    from autoeff.search.compare import compare, write_fronts

    search(out="small", trials=6, limits=["price<=20"])
    whole = search(out="all", trials=60)
    comparison = compare(["small", "all"], Settings.read())
    best = {budget["budget"]: budget["best"] for budget in comparison.budgets}
    cheap = max(g for g, p in truth().values() if p <= 20)
    assert best["price<=20"][1]["gain"] == cheap
    assert best["any budget"][1]["gain"] == max(g for g, _ in truth().values())
    assert [point["cost"] for point in comparison.fronts[1]] == sorted(r["measurements"]["price"]["value"] for r in whole.front)
    assert comparison.settings["budget.trials"] == [6, 60]
    assert write_fronts(comparison, Path("fronts")).exists()
    search(out="other", objectives=["price"])
    with pytest.raises(InputError, match="the objective differs"):
        compare(["small", "other"], Settings.read())


def test_candidates_differ_by_their_configurations_alone() -> None:
    import random

    import numpy as np

    def drawn(_: Any) -> dict[str, float]:
        return {"python": random.random(), "numpy": np.random.rand(), "torch": float(torch.rand(1))}

    torch.rand(7)
    rows = search(metrics=[drawn], objectives=["python"]).rows
    assert len({json.dumps(row["measurements"], sort_keys=True) for row in rows}) == 1
    torch.rand(7)
    assert search(metrics=[drawn], objectives=["python"], out="again").rows[0]["measurements"] == rows[0]["measurements"]
    assert search(metrics=[drawn], objectives=["python"], out="other", seed=1).rows[0]["measurements"] != rows[0]["measurements"]


def test_a_search_of_one_objective_draws_it_over_the_trials(machine: Path) -> None:
    result = search(objectives=["gain"], metrics=[gain], trials=8)
    assert (machine / "run" / "front.png").exists()
    assert result.summary["rows"][-1]["role"] == "found"
    assert main(["best", "run"]) == 0


def test_the_page_of_the_documentation_runs(root: Path, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (root / "docs" / "own_code.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Callable[..., Any]] = {"__name__": "page"}
    exec(compile(code, "own_code.md", "exec"), names)
    assert "'depth'" in capsys.readouterr().out
    assert (machine / "runs" / "circle" / "report.html").exists()
