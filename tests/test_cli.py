"""The command: every verb on a stored search, exit codes, and one clear line for whatever is wrong with the input."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import autoeff
from autoeff.cli import main
from autoeff.console import Watcher, duration
from autoeff.errors import AutoeffError, FailureClass
from autoeff.search import doctor, run
from autoeff.search.coordinator import Progress
from autoeff.search.doctor import SUPPORTED, supports
from autoeff.search.job import JobSpec
from autoeff.search.run import Result
from autoeff.search.runs import new_run
from autoeff.search.settings import Settings
from autoeff.search.storage.records import JobState, Origin, Proposal
from autoeff.search.storage.store import Store
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import Measurement, Split
from autoeff.spaces.space import Decision, SearchSpace

JOB = "0123456789ab"
FENCE = 1
WORDS = "the cat sat on the mat and the dog ate the other hat, then they all went there again. "


@dataclass
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        lines = self.err.splitlines()
        assert self.code == 2, self.err
        assert self.out == ""
        assert len(lines) == 1, self.err
        assert lines[0].startswith("autoeff: error: ")
        return lines[0]


Command = Callable[..., Answer]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own for every test, with its working directory beside it."""
    for name in [name for name in os.environ if name.startswith("AUTOEFF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOEFF_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run_command(*arguments: str | Path) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run_command


def space() -> SearchSpace:
    costs: tuple[dict[str, int], ...] = ({}, {"linear_bytes": -1536}, {"linear_bytes": -1792})
    decisions = tuple(Decision(f"model.layers.{block}.mlp.down_proj", "bits", block, (16, 4, 2), {(): costs}) for block in range(2))
    dense = {"linear_bytes": 4096, "linear_parameters": 2048, "other_bytes": 1000, "lookup_bytes": 0, "kv_bytes_per_token": 8}
    return SearchSpace(decisions, dense | {"flops_per_token": 4096})


def fill(database: str, *limits: str) -> None:
    """Makes a database with one search of six trials."""
    the_space = space()
    spec = JobSpec.parse({"model": "demo", "limits": limits, "objectives": "kl,linear_bytes"}).model_dump(mode="json")
    preflight = {"quality": "kl", "model": {"context": 64}, "text": {"search": {"windows": 4}}}
    cost_model = CostModel(the_space, batch=1, context=64)
    bounds = [(name, float(bound)) for name, bound in (limit.split("<=") for limit in limits) if name != "kl"]
    trials: tuple[tuple[tuple[int, int], float | None, Origin, str | None, Split], ...] = (
        ((0, 0), 0.0, "dense", None, "search"),
        ((1, 1), 0.2, "uniform", "bits=4", "search"),
        ((2, 2), 3.0, "uniform", "bits=2", "search"),
        ((2, 1), None, "searched", None, "search"),
        ((1, 2), 0.9, "searched", None, "search"),
        ((1, 2), 0.95, "searched", None, "held_out"),
    )
    with Store.open(database) as store:
        store.create_job(JOB, spec, preflight, the_space.to_json(), "digest")
        fence = store.acquire_coordinator(JOB, "host/boot/1/0.00", 3600)
        assert fence == FENCE
        for number, (indices, kl, origin, label, split) in enumerate(trials):
            costs = cost_model.values(indices)
            feasible = all(costs[name] <= bound for name, bound in bounds)
            proposal = Proposal(number, the_space.at(indices), origin, split, 4, 1.0, f"{number:064}", costs, feasible, label)
            claim = store.propose(JOB, fence, proposal, claim_for="worker", ttl_s=60).claim
            assert claim is not None
            if kl is None:
                store.fail(claim, FailureClass.OOM_HOST, "out of memory", "the last words")
            else:
                store.complete(claim, [Measurement("kl" if split == "search" else "kl_held_out", kl, split, 2048, 0.01)], 1.0)


class Stored:
    """A search in the database of `home`, with its run directory."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.database = Settings.read().database
        home = Path(self.database.removeprefix("sqlite:///")).parent
        home.mkdir()
        shutil.copy(template, home / "autoeff.db")
        with new_run(folder, JOB, self.database) as self.folder:
            pass

    def finish(self, result: dict[str, Any]) -> None:
        with Store.open(self.database) as store:
            store.set_job_state(JOB, FENCE, JobState.RUNNING)
            store.set_job_state(JOB, FENCE, JobState.SUCCEEDED, result)
            store.release_coordinator(JOB, FENCE)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The database of a search with these limits; made once."""

    @cache
    def make(*limits: str) -> Path:
        path = tmp_path_factory.mktemp("template") / "autoeff.db"
        fill(f"sqlite:///{path}", *limits)
        return path

    return make


@pytest.fixture
def search_with(tmp_path: Path, template: Callable[..., Path]) -> Callable[..., Stored]:
    return lambda *limits: Stored(tmp_path / "run", template(*limits))


@pytest.fixture
def stored(search_with: Callable[..., Stored]) -> Stored:
    return search_with("linear_bytes<=1000")


# Verbs that read


def test_version_and_help(command: Command) -> None:
    assert command("--version").out == f"autoeff {autoeff.__version__}\n"
    assert "doctor" in command("--help").out
    assert command().out == command("--help").out
    assert "weight_bytes<=0.30x" in " ".join(command("search", "--help").out.split())


def test_rows_have_the_public_form(command: Command, stored: Stored) -> None:
    rows = command("ls", stored.folder, "--format", "json").json
    assert [row["trial"] for row in rows] == [0, 1, 2, 3, 4, 5]
    row = rows[4]
    assert row["digest"] == space().at((1, 2)).digest
    assert (row["origin"], row["state"]) == ("searched", "succeeded")
    assert row["configuration"] == {"model.layers.0.mlp.down_proj:bits": 4, "model.layers.1.mlp.down_proj:bits": 2}
    assert row["measurements"]["kl"] == {
        "value": 0.9, "unit": "nats/token", "split": "search", "tokens": 2048, "spread": 0.01, "method": "measured"
    }  # fmt: skip
    assert row["measurements"]["kl_held_out"]["value"] == 0.95
    assert row["measurements"]["linear_bytes"] == {"value": 4096 - 1536 - 1792, "unit": "bytes", "method": "exact"}
    assert rows[3]["failure"] == {"class": "oom_host", "message": "out of memory"}


def test_a_run_is_named_by_directory_or_job(command: Command, stored: Stored) -> None:
    for verb in ("ls", "pareto", "best", "status"):
        by_id = command(verb, JOB, "--format", "json")
        by_folder = command(verb, stored.folder, "--format", "json")
        assert by_id.code == by_folder.code == 0
        if verb != "status":
            assert by_id.json == by_folder.json


def test_ls_lists_jobs(command: Command, stored: Stored) -> None:
    (row,) = command("ls", "--format", "json").json
    assert (row["job"], row["state"], row["model"], row["trials"], row["limits"]) == (JOB, "pending", "demo", 6, ["linear_bytes<=1000"])
    assert JOB in command("ls").out


def test_ls_without_jobs_says_how_to_make_one(command: Command) -> None:
    assert command("ls", "--format", "json").json == []
    assert "autoeff search demo" in command("ls").err


def test_show_prints_the_row_or_all_of_it(command: Command, stored: Stored) -> None:
    assert command("show", stored.folder, "4", "--format", "json").json == command("ls", stored.folder, "--format", "json").json[4]
    table = command("show", stored.folder, "4").out
    assert re.search(r"kl +0\.9000 +0\.01 +search +2048 +measured", table)
    assert re.search(r"model\.layers\.1\.mlp\.down_proj:bits +2", table)
    failed = command("show", stored.folder, "3").out
    assert "oom_host: out of memory" in failed
    assert "the last words" in failed


def test_pareto_keeps_the_limits(command: Command, stored: Stored) -> None:
    assert [row["trial"] for row in command("pareto", stored.folder, "--format", "json").json] == [2, 4]
    assert "bits=2" in command("pareto", stored.folder).out


def test_best_is_the_best_within_the_limits(command: Command, stored: Stored) -> None:
    answer = command("best", stored.folder, "--format", "json")
    assert (answer.code, answer.json["trial"]) == (0, 4)
    assert command("show", stored.folder, "best", "--format", "json").json["trial"] == 4


@pytest.mark.parametrize(("limit", "kept"), [("linear_bytes<=1000", []), ("linear_bytes<=1100", [1])])
def test_a_limit_on_quality_counts(command: Command, search_with: Callable[..., Stored], limit: str, kept: list[int]) -> None:
    stored = search_with(limit, "kl<=0.5")
    assert [row["trial"] for row in command("pareto", stored.folder, "--format", "json").json] == kept
    best = command("best", stored.folder, "--format", "json")
    if kept:
        assert best.json["trial"] == kept[0]
    else:
        assert "no feasible trial" in best.error


def test_best_without_limits_points_to_pareto(command: Command, search_with: Callable[..., Stored]) -> None:
    stored = search_with()
    assert "autoeff pareto" in command("best", stored.folder).error
    assert [row["trial"] for row in command("pareto", stored.folder, "--format", "json").json] == [0, 1, 2, 4]


def test_a_finished_search_keeps_its_word(command: Command, stored: Stored) -> None:
    stored.finish({"quality": "kl", "state": "feasible", "front": [4], "found": 4, "closest": None})
    assert command("best", stored.folder, "--format", "json").json["trial"] == 4
    assert [row["trial"] for row in command("pareto", stored.folder, "--format", "json").json] == [4]
    status = command("status", stored.folder, "--format", "json").json
    assert (status["state"], status["best"], status["best_kl"], status["front"]) == ("succeeded", 4, 0.9, 1)


def test_an_infeasible_search_shows_the_closest_under_its_own_code(command: Command, stored: Stored) -> None:
    stored.finish({"quality": "kl", "state": "infeasible", "front": [], "found": None, "closest": 2})
    answer = command("best", stored.folder, "--format", "json")
    assert (answer.code, answer.json["trial"]) == (3, 2)
    assert "closest" in answer.err


def test_status_of_a_search_that_nobody_drives(command: Command, stored: Stored) -> None:
    with Store.open(stored.database) as store:
        store.release_coordinator(JOB, FENCE)
    answer = command("status", stored.folder)
    assert re.search(r"trials +6\n", answer.out)
    assert f"autoeff resume {stored.folder}" in answer.err


def test_a_search_is_steered_from_another_terminal(command: Command, stored: Stored) -> None:
    changed = command("budget", stored.folder, "--trials", "40", "--timeout", "2m", "--format", "json").json
    assert (changed["budget"], changed["state"]) == (40, "pending")
    with Store.open(stored.database) as store:
        assert store.orders(JOB, FENCE).budget == {"trials": 40, "seconds": 120.0}
    assert re.search(r"state +paused\n", command("pause", stored.folder, "--now").out)
    assert command("cancel", JOB, "--format", "json").json["state"] == "cancelled"
    assert "is cancelled" in command("pause", stored.folder).error
    assert "is cancelled" in command("budget", stored.folder, "--trials", "9").error
    assert "--trials, --timeout or both" in command("budget", stored.folder).error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["show", "RUN", "99"], "no trial 99"),
        (["show", "RUN", "first"], "number"),
        (["show", "RUN", "-1"], "No such option"),
        (["show", "absent", "0"], "neither a run directory nor a job"),
        (["ls", "./absent"], "no run directory"),
        (["resume", "absent"], "neither a run directory nor a job"),
        (["ls", "RUN", "--format", "xml"], "'table', 'json'"),
        (["export", "RUN", "4", "out", "--format", "onnx"], "unknown exporter 'onnx'"),
        (["export", "RUN", "3", "out"], "trial 3"),
        (["export", "RUN", "99", "out"], "no trial 99"),
        (["sreach"], "No such command 'sreach'"),
        (["show"], "Missing argument 'RUN'"),
    ],
)
def test_a_bad_read_is_one_line(command: Command, stored: Stored, arguments: list[str], word: str) -> None:
    assert word in command(*(str(stored.folder) if a == "RUN" else a for a in arguments)).error
    assert not Path("out").exists()


# Bad input of a search


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 200)
    return path


@pytest.fixture
def model(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


Arguments = list[str | Path]
Damage = Callable[[Path, Path, Arguments], object]


def set_config(model: Path, **settings: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD: dict[str, tuple[Damage, str]] = {
    "no model directory": (lambda model, text, rest: shutil.rmtree(model), "model"),
    "pickle weights": (lambda model, text, rest: pickled(model), "safetensors"),
    "truncated safetensors": (lambda model, text, rest: truncated(model), "model.safetensors"),
    "huge hidden_size": (lambda model, text, rest: set_config(model, hidden_size=10**9), "hidden_size"),
    "code in config.json": (lambda model, text, rest: set_config(model, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "no text": (lambda model, text, rest: text.unlink(), "text.txt"),
    "empty text": (lambda model, text, rest: text.write_text(""), "text.txt"),
    "short text": (lambda model, text, rest: text.write_text("the cat"), "shorter than one window"),
    "unknown knob": (lambda model, text, rest: rest.extend(["--knobs", "bits,bobs"]), "'bobs'"),
    "unknown setting": (lambda model, text, rest: rest.extend(["--set", "bits.size=3"]), "bits.size"),
    "unknown level": (lambda model, text, rest: rest.extend(["--levels", "*=16,5"]), "no level 5"),
    "glob without match": (lambda model, text, rest: rest.extend(["--include", "nothing*"]), "'nothing*'"),
    "unknown sampler": (lambda model, text, rest: rest.extend(["--sampler", "magic"]), "'magic'"),
    "unknown objective": (lambda model, text, rest: rest.extend(["--objective", "kl,beauty"]), "'beauty'"),
    "unknown device": (lambda model, text, rest: rest.extend(["--device", "abacus"]), "'abacus'"),
    "malformed limit": (lambda model, text, rest: rest.extend(["--limit", "weight_bytes<0,3"]), "weight_bytes<0,3"),
    "unreachable limit": (lambda model, text, rest: rest.extend(["--limit", "linear_bytes<=0.01x"]), "cannot be reached"),
    "too few trials": (lambda model, text, rest: rest.extend(["--trials", "3"]), "at least"),
    "bad number": (lambda model, text, rest: rest.extend(["--trials", "many"]), "'--trials'"),
    "unknown flag": (lambda model, text, rest: rest.append("--wondows"), "--wondows"),
    "no job file": (lambda model, text, rest: rest.extend(["--config", "absent.yaml"]), "absent.yaml"),
    "unknown key in YAML": (lambda model, text, rest: rest.extend(["--config", yaml_file("budget: {trails: 3}")]), "'budget.trails'"),
    "out below a file": (lambda model, text, rest: rest.extend(["--out", text / "run"]), "Not a directory"),
    "out where nothing can be made": (lambda model, text, rest: rest.extend(["--out", "/proc/self/run"]), "/proc/self/run"),
}


def yaml_file(content: str) -> Path:
    path = Path("job.yaml").absolute()
    path.write_text(content)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_touches_nothing(case: str, model: Path, text: Path, stored: Stored, command: Command) -> None:
    damage, word = BAD[case]
    rest: Arguments = []
    damage(model, text, rest)
    before, jobs = snapshot(), command("ls", "--format", "json").out
    out: Arguments = [] if "--out" in rest else ["--out", "new/run"]
    assert word in command("search", model, "--data", text, "--length", "16", *out, *rest).error
    assert snapshot() == before
    assert command("ls", "--format", "json").out == jobs


@pytest.mark.parametrize("case", ["truncated safetensors", "short text", "unreachable limit", "unknown key in YAML"])
def test_a_dry_run_refuses_the_same(case: str, model: Path, text: Path, command: Command) -> None:
    damage, word = BAD[case]
    rest: Arguments = []
    damage(model, text, rest)
    assert word in command("search", model, "--data", text, "--length", "16", *rest, "--dry-run").error


def snapshot() -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().absolute().rglob("*")}


def test_an_existing_out_is_refused_before_anything_is_read(command: Command, stored: Stored) -> None:
    line = command("search", "/no/such/model", "--out", stored.folder).error
    assert f"{stored.folder} exists already" in line
    assert [path.name for path in stored.folder.iterdir()] == ["run.json"]


def test_a_read_only_place_is_one_line(model: Path, text: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def read_only(path: Path, *arguments: Any, **options: Any) -> None:
        if "run" in path.name.split("."):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "Read-only file system" in command("search", model, "--data", text, "--length", "16", "--out", "run").error
    assert command("ls", "--format", "json").json == []


def test_a_search_without_a_model_says_so(command: Command) -> None:
    assert "names no model" in command("search").error


def test_an_unusable_home_is_one_line(model: Path, text: Path, command: Command, home: Path) -> None:
    home.write_text("a file")
    assert str(home) in command("search", model, "--data", text, "--length", "16").error


# Dry run


def test_a_dry_run_says_what_is_known_and_makes_nothing(model: Path, text: Path, command: Command, home: Path) -> None:
    arguments: Arguments = ["search", model, "--data", text, "--length", "16", "--limit", "linear_bytes<=0.5x", "--dry-run"]
    answer = command(*arguments)
    assert answer.code == 0, answer.err
    for part in (
        r"parameters +\d",
        r"least --trials +\d+",
        r"linear_bytes +[\d.]+ kB +[\d.]+ kB +0\.\d{4}x +linear_bytes<=0.5x",
        r"decisions +\d+",
        r"memory needed +[\d.]+ MB of the [\d.]+ GB that are allowed",
        r"level bank +[\d.]+ [kM]B, [\d.]+ [kM]B of them to be built",
        r"time +about .* s for the bank, .* s an evaluation, at most .* in all",
    ):
        assert re.search(part, answer.out), part
    found = command(*arguments, "--format", "json").json
    assert found["least"]["linear_bytes"] < found["limits"][0]["bound"] == found["dense"]["linear_bytes"] / 2
    assert list(Path().iterdir()) == []
    assert not home.exists()


def test_the_job_that_a_dry_run_prints_is_the_same_job(model: Path, text: Path, command: Command) -> None:
    arguments: Arguments = [
        "search",
        model,
        "--data",
        text,
        "--length",
        "16",
        "--set",
        "bits.group_size=32",
        "--dry-run",
        "--format",
        "json",
    ]
    first = command(*arguments).json
    path = yaml_file(JobSpec.parse(first["job"]).to_yaml())
    again = command("search", "--config", path, "--dry-run", "--format", "json").json
    assert again | {"seconds": None} == first | {"seconds": None}  # predicted from a sample of the machine's speed
    assert first["job"]["knobs"] == {"bits": {"group_size": 32}}


# The search itself


SUMMARY: dict[str, Any] = {
    "quality": "kl", "limits": [], "state": "feasible", "front": [4], "found": 4, "closest": None, "seconds": 1.0, "notices": [],
    "rows": [
        {
            "role": role, "label": label, "trial": trial, "point": None, "feasible": True, "origin": "searched",
            "costs": {"linear_bytes": cost, "avg_bits": cost / 256}, "search": kl, "held_out": kl, "perplexity_held_out": 8 + kl,
            "spearman_held_out": None,
        }
        for role, label, trial, cost, kl in (("uniform", "bits=4", 1, 1024, 0.2), ("found", None, 4, 768, 0.1))
    ],
}  # fmt: skip


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, stored: Stored) -> Callable[..., None]:
    """Replaces the search by one that reports progress and ends as it is told."""

    def install(exit_code: int = 0, error: BaseException | None = None) -> None:
        def start(spec: object, out: Path, settings: object, watch: Callable[[Progress], None]) -> Result:
            for phase, used, notice in (("loading", 0, "text of another version"), ("table", 10, None), ("search", 60, None)):
                watch(Progress(phase, 5, 0, used, 100, 0.1, "kl", 3, 1, 2.0, 120.0, notice))
            if error is not None:
                out.mkdir()
                raise error
            return Result(JOB, stored.folder, exit_code, SUMMARY, [])

        monkeypatch.setattr(run, "start", start)

    return install


@pytest.mark.parametrize("exit_code", [0, 3])
def test_the_end_table_and_the_exit_code(command: Command, engine: Callable[..., None], stored: Stored, exit_code: int) -> None:
    engine(exit_code)
    answer = command("search", "demo", "--out", "new")
    assert answer.code == exit_code
    assert re.search(r"found +4 +768 B +3\.000 +0\.1000 +0\.1000 +8\.100", answer.out)
    assert "50% less kl than uniform bits=4 at 25.0% less linear_bytes" in answer.out
    assert str(stored.folder / "report.html") in answer.out


def test_progress_goes_to_stderr_in_lines(command: Command, engine: Callable[..., None]) -> None:
    engine()
    answer = command("search", "demo", "--out", "new", "--format", "json")
    assert answer.err.splitlines() == [
        "autoeff: notice: text of another version",
        "autoeff: loading the model, 5 trials, best kl 0.1, 3 on the front, 1 failed, 2 s, 2 min left",
        "autoeff: measuring the damage table, 5 trials, 10 of 100 evaluations, best kl 0.1, 3 on the front, 1 failed, 2 s, 2 min left",
        "autoeff: searching, 5 trials, 60 of 100 evaluations, best kl 0.1, 3 on the front, 1 failed, 2 s, 2 min left",
    ]
    assert (answer.json["found"], answer.json["exit_code"], answer.json["job"]) == (4, 0, JOB)


def test_ctrl_c_says_how_to_go_on(command: Command, engine: Callable[..., None]) -> None:
    engine(error=KeyboardInterrupt())
    answer = command("search", "demo", "--out", "new")
    assert answer.code == 130
    assert "`autoeff resume new` goes on" in answer.err
    assert answer.out == ""


def test_a_failure_is_one_line(command: Command, engine: Callable[..., None]) -> None:
    engine(error=AutoeffError("the disk is full;\nfree some"))
    answer = command("search", "demo", "--out", "new")
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "autoeff: error: the disk is full; free some"


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_of_ours_leaves_its_traceback_in_a_file(
    command: Command, engine: Callable[..., None], home: Path, debug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(error=ZeroDivisionError("oops"))
    if debug:
        monkeypatch.setenv("AUTOEFF_DEBUG", "1")
    answer = command("search", "demo", "--out", "new")
    assert answer.code == 1
    last = answer.err.splitlines()[-1]
    assert last.startswith("autoeff: error: ZeroDivisionError: oops")
    (log,) = home.glob("*.log")
    assert str(log) in last
    assert "Traceback" in log.read_text()
    assert ("Traceback" in answer.err) == debug


def test_a_live_line_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with Watcher() as watcher:
        watcher.watch(Progress("search", 5, 0, 60, 100, 0.1, "kl", 3, 0, 2.0, None, "once [only]"))
    err = capsys.readouterr().err
    assert "notice: once [only]" in err
    assert "searching, 5 trials, 60 of 100 evaluations" in err


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5990, "100 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Doctor


def test_doctor_finds_a_healthy_machine_and_changes_nothing(command: Command, home: Path) -> None:
    answer = command("doctor", "--format", "json")
    assert answer.code == 0, answer.out
    checks = {check["name"]: check for check in answer.json["checks"]}
    assert {"python", "torch", "transformers", "optuna", "memory", "cores", "home", "disk", "database"} <= set(checks)
    plugins = {(plugin["kind"], plugin["name"]): plugin["where"] for plugin in answer.json["plugins"]}
    assert plugins["knob", "bits"] == "autoeff.spaces.knobs.bits"
    assert {("knob", "skip"), ("quantizer", "rtn"), ("sampler", "additive"), ("exporter", "hf-dense")} <= set(plugins)
    assert not home.exists()
    assert "bits" in command("doctor").out


def test_doctor_names_the_remedy(command: Command, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "autoeff.db").write_text("no database, " * 100)
    monkeypatch.setattr(doctor, "SUPPORTED", {"torch": ">=99", "no-such-package": ">=1"})
    answer = command("doctor", "--format", "json")
    assert answer.code == 1
    checks = {check["name"]: check for check in answer.json["checks"]}
    assert checks["torch"]["state"] == "warning"
    assert checks["no-such-package"] == {
        "name": "no-such-package", "state": "broken", "found": "not installed", "remedy": "pip install 'no-such-package>=1'"
    }  # fmt: skip
    assert checks["database"]["state"] == "broken"
    assert "autoeff.db" in checks["database"]["found"]


def test_doctor_sees_a_home_that_cannot_be_written(command: Command, home: Path) -> None:
    home.write_text("a file")
    checks = {check["name"]: check for check in command("doctor", "--format", "json").json["checks"]}
    assert checks["home"]["state"] == "broken"
    assert "AUTOEFF_HOME" in checks["home"]["remedy"]


def test_doctor_survives_a_broken_plugin(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, type]:
        raise ImportError("no module\nnamed x")

    monkeypatch.setattr(doctor, "known_knobs", broken)
    answer = command("doctor", "--format", "json")
    assert answer.code == 1
    assert {"name": "knobs", "state": "broken", "found": "no module named x", "remedy": "uninstall or mend the package that brings it"} in (
        answer.json["checks"]
    )


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9", ">=2.11", False),
        ("5.0.0", ">=5.0,<6", True),
        ("5.0.0b1", ">=5.0,<6", True),
        ("6.0", ">=5.0,<6", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, fits: bool) -> None:
    assert supports(version, wanted) == fits


def test_doctor_and_package_agree_on_versions(root: Path) -> None:
    project = (root / "pyproject.toml").read_text()
    for name, wanted in SUPPORTED.items():
        assert f'"{name}{wanted}' in project


# The installed command


def test_the_installed_command_searches_and_its_result_is_shown(model: Path, text: Path, command: Command) -> None:
    program = Path(sys.executable).with_name("autoeff")
    rest = ["--length", "16", "--windows", "4", "--knobs", "bits,skip", "--limit", "linear_bytes<=0.3x", "--trials", "50"]
    arguments: Arguments = [program, "search", model, "--data", text, *rest, "--out", "run", "--format", "json"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["state"] == "feasible"
    assert sorted(path.name for path in Path("run").iterdir() if path.suffix != ".log") == ["front.png", "report.html", "run.json"]
    best = command("best", "run", "--format", "json").json
    assert best["trial"] == summary["found"]
    assert "exists already" in command("search", model, "--data", text, "--out", "run").error


def test_the_installed_command_ends_quietly_when_its_reader_leaves(stored: Stored) -> None:
    program = Path(sys.executable).with_name("autoeff")
    with subprocess.Popen([program, "ls", stored.folder, "--format", "json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode not in (0, -signal.SIGPIPE)
