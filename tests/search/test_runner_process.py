"""A real runner process: warm, killed, over its caps, and what each ending is called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from autoeff.errors import CandidateError, FailureClass, InputError, RunnerLost
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.search.runner_process import RunnerProcess, answers
from autoeff.search.settings import Settings
from autoeff.spaces.space import SpaceSpec

FFN = "model.layers.{}.mlp:faulty"
LEVELS = {FFN.format(i): "none" for i in range(3)}


@pytest.fixture
def runner_of(tiny_models: dict[str, Path], tmp_path: Path, third_party_knobs: Path) -> Iterator[Callable[..., RunnerProcess]]:
    made: list[RunnerProcess] = []

    def make(model: Path | None = None, lines: int = 60, **settings: float) -> RunnerProcess:
        text = tmp_path / "text.txt"
        text.write_text("the cat sat on the mat and the dog ate the other hat\n" * lines)
        data = TextSpec(str(text), windows=4, length=16)
        setup = EvaluationSetup(str(model or tiny_models["llama"]), data, None, SpaceSpec({"faulty": {}}), 0, "cpu", str(tmp_path / "bank"))
        made.append(RunnerProcess(setup, Settings(home=tmp_path, **settings), tmp_path / "runner.log"))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


def ask(runner: RunnerProcess, level: str = "none") -> float:
    found = runner.evaluate(EvaluationRequest({**LEVELS, FFN.format(1): level}, "search", 4))
    return found.measurements[0].value


def group_of(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None


def test_one_process_serves_many_evaluations_and_is_told_no_secrets(
    runner_of: Callable[..., RunnerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of()
    for name in ("AUTOEFF_DATABASE_URL", "AUTOEFF_BROKER_URL", "AUTOEFF_KEY", "AUTOEFF_SECRET", "HF_TOKEN", "PGPASSWORD", "DB_PASSWORD"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("KEYBOARD", "harmless")
    assert [ask(runner) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert runner.starts == 1
    told = psutil.Process(runner.pid).environ()
    assert "canary" not in told.values()
    assert told["KEYBOARD"] == "harmless"


HARM = {
    "segfault": (FailureClass.CRASH, "SIGSEGV"),
    "nan": (FailureClass.NAN, "not finite"),
    "raise": (FailureClass.INVALID, "RuntimeError"),
    "hog": (FailureClass.OOM_HOST, "the cap is"),
    "no memory": (FailureClass.OOM_GPU, "ALLOC_FAILED"),
}


def test_harmful_candidates_fail_with_a_log_and_the_next_one_is_served(runner_of: Callable[..., RunnerProcess]) -> None:
    runner = runner_of(evaluation_timeout_s=60.0, memory_cap_bytes=3 << 30)
    for number, (level, (failure, message)) in enumerate(HARM.items(), start=1):
        with pytest.raises(CandidateError, match=message) as caught:
            ask(runner, level)
        assert caught.value.failure is failure
        log = runner.log_tail()  # what an earlier candidate printed is not this one's
        assert ("Segmentation fault" in log, "told to raise" in log) == (level == "segfault", level == "raise")
        assert ask(runner) == 0.0
        assert runner.starts == number + 1


def test_a_candidate_that_hangs_fails_and_the_next_one_is_served(runner_of: Callable[..., RunnerProcess]) -> None:
    """And what it has started ends with it."""
    runner = runner_of(evaluation_timeout_s=2.0)
    assert ask(runner) == 0.0
    group = runner.pid
    with pytest.raises(CandidateError, match="no answer within 2 s") as caught:
        ask(runner, "forks")
    assert caught.value.failure is FailureClass.TIMEOUT
    until = time.monotonic() + 10.0
    while left := [process for process in psutil.process_iter() if group_of(process) == group]:
        assert time.monotonic() < until, left
    assert ask(runner) == 0.0
    assert runner.starts == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_runner_killed_from_outside_is_lost_not_failed(runner_of: Callable[..., RunnerProcess], how: signal.Signals) -> None:
    runner = runner_of()
    ask(runner)
    assert runner.pid is not None
    os.kill(runner.pid, how)
    with pytest.raises(RunnerLost, match=how.name):
        ask(runner)
    assert ask(runner) == 0.0


def test_a_runner_whose_device_fails_is_lost_not_failed(runner_of: Callable[..., RunnerProcess]) -> None:
    runner = runner_of()
    with pytest.raises(RunnerLost, match="uncorrectable ECC error"):
        ask(runner, "device")
    assert ask(runner) == 0.0


def test_a_runner_that_cannot_open_a_good_setup_is_lost(runner_of: Callable[..., RunnerProcess]) -> None:
    ask(runner_of())  # from here on runners are forked at once
    with pytest.raises(RunnerLost, match="could not open the job: no answer within"):
        ask(runner_of(lines=50_000, open_timeout_s=0.3))


def test_a_setup_that_cannot_be_opened_is_bad_input(runner_of: Callable[..., RunnerProcess], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        ask(runner_of(tmp_path / "nowhere"))


def test_the_lease_is_looked_after_while_a_candidate_runs(runner_of: Callable[..., RunnerProcess]) -> None:
    runner, ticks = runner_of(evaluation_timeout_s=1.0), []
    with pytest.raises(CandidateError):
        runner.evaluate(EvaluationRequest({**LEVELS, FFN.format(0): "loop"}, "search", 4), lambda: ticks.append(time.monotonic()))
    assert len(ticks) > 5


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_runner_dies_with_its_parent_even_while_it_loops(tiny_models: dict[str, Path], tmp_path: Path, third_party_knobs: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; import test_runner_process as t\n"
        f"tmp, model = Path({str(tmp_path)!r}), Path({str(tiny_models['llama'])!r})\n"
        "(tmp / 'text.txt').write_text('the cat sat on the mat ' * 200)\n"
        "data = t.TextSpec(str(tmp / 'text.txt'), windows=4, length=16)\n"
        "setup = t.EvaluationSetup(str(model), data, None, t.SpaceSpec({'faulty': {}}), 0, 'cpu', str(tmp / 'bank'))\n"
        "runner = t.RunnerProcess(setup, t.Settings(home=tmp), tmp / 'log')\n"
        "runner.open(); print(runner.pid, flush=True); t.ask(runner, 'loop')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_lease_is_renewed_while_progress_is_reported() -> None:
    reading, writing = os.pipe()
    ticks: list[float] = []

    def report() -> None:
        for done in range(60):  # a level bank of many small entries
            os.write(writing, json.dumps({"kind": "progress", "done": done}).encode() + b"\n")
            time.sleep(0.01)
        os.close(writing)

    thread = threading.Thread(target=report)
    thread.start()
    found = list(answers(reading, os.getpid(), bytearray(), Settings(), 60.0, lambda: ticks.append(time.monotonic())))
    thread.join()
    os.close(reading)
    assert [answer["done"] for answer in found] == list(range(60))
    assert len(ticks) >= 3


@pytest.mark.parametrize("line", [b'{"kind": "measured", "mea\n', b"[1]\n", b"{}\n", b"\xff\n"])
def test_what_is_no_answer_is_the_candidates_failure(line: bytes) -> None:
    reading, writing = os.pipe()
    os.write(writing, line)
    os.close(writing)
    with pytest.raises(CandidateError, match="which is no answer") as caught:
        list(answers(reading, os.getpid(), bytearray(), Settings(), 60.0, lambda: None))
    os.close(reading)
    assert caught.value.failure is FailureClass.INVALID


def test_an_answer_that_is_cut_off_is_none() -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"kind": "measured", "mea')
    os.close(writing)
    assert list(answers(reading, os.getpid(), bytearray(), Settings(), 60.0, lambda: None)) == []
    os.close(reading)


def test_a_process_that_has_ended_before_it_is_looked_at_gives_no_answer() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    reading, writing = os.pipe()
    os.close(writing)
    assert list(answers(reading, ended.pid, bytearray(), Settings(), 60.0, lambda: None)) == []
    os.close(reading)


def test_an_answer_counts_however_late_it_is_read(tmp_path: Path) -> None:
    """On a busy machine a process may answer and end between two looks at it; the second one would find it dead."""
    reading, writing = os.pipe()
    looks: list[bytes] = []

    def look() -> None:
        assert not looks, "looked at once more before the answer was taken"
        looks.append(b'{"kind": "measured"}\n')
        os.write(writing, looks[0])
        time.sleep(0.3)

    try:
        assert next(answers(reading, os.getpid(), bytearray(), Settings(home=tmp_path), 20, look)) == {"kind": "measured"}
        assert looks
    finally:
        os.close(reading)
        os.close(writing)
