"""Runners by fork: replaced servers, servers that die or cannot start, what a runner inherits."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from autoeff.errors import RunnerLost
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.fork_server import Forked, ForkServer, fork_server
from autoeff.search.job import JobSpec
from autoeff.search.model import plan
from autoeff.search.runner_process import RunnerProcess, prestart
from autoeff.search.settings import Settings

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def forked(server: ForkServer, ticks: list[float] | None = None, timeout_s: float = 60.0) -> Forked:
    with tempfile.TemporaryFile() as log:
        return server.fork(log, timeout_s, lambda: None if ticks is None else ticks.append(time.monotonic()))


def ended(runner: Forked) -> int:
    """Its exit code, once it has nothing more to read."""
    runner.stdin.close()
    runner.stdout.close()
    return runner.wait(20)


def server_of(runner: Forked) -> psutil.Process:
    parent = psutil.Process(runner.pid).parent()
    assert parent is not None
    return parent


def test_runners_of_one_server_are_there_at_once_and_end_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    server = ForkServer(ENVIRONMENT)
    one = forked(server, ticks)
    assert ticks, "the lease is looked after while the server imports"
    monkeypatch.chdir(tmp_path)
    other = forked(server)
    assert server_of(one) == server_of(other)
    until = time.monotonic() + 20
    while psutil.Process(other.pid).cwd() != str(tmp_path) or os.getsid(other.pid) != other.pid:
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.0)
    one.kill()
    assert ended(one) == one.poll() == -signal.SIGKILL
    assert other.poll() is None
    assert ended(other) == 0


def test_an_environment_has_its_server_and_a_replaced_one_ends_with_its_last_runner() -> None:
    one = forked(fork_server({**ENVIRONMENT, "FOR_TEST": "1"}))
    assert fork_server({**ENVIRONMENT, "FOR_TEST": "1"}) is fork_server({**ENVIRONMENT, "FOR_TEST": "1"})
    assert psutil.Process(one.pid).environ()["FOR_TEST"] == "1"
    server = server_of(one)
    prestart("cpu")
    assert one.poll() is None
    assert ended(one) == 0
    del one
    server.wait(20)


def test_runners_end_with_their_server() -> None:
    runner = forked(fork_server(ENVIRONMENT))
    server_of(runner).kill()
    assert ended(runner) == -signal.SIGKILL
    runner.kill()


def test_a_runner_that_nobody_waits_for_any_more_is_killed() -> None:
    """As where a process of a pool was killed, whose worker goes on with the same server."""
    runner = forked(fork_server(ENVIRONMENT))
    process, server = psutil.Process(runner.pid), server_of(runner)
    runner._status.close()
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running()
    assert server.is_running()
    runner.stdin.close()
    runner.stdout.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('a broken installation')\n")
    with pytest.raises(RunnerLost, match="could be forked: ImportError: a broken installation"):
        forked(ForkServer(ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}))


def test_a_server_that_is_not_there_in_time_is_lost() -> None:
    server = ForkServer(ENVIRONMENT)
    with pytest.raises(RunnerLost, match=r"within 0\.2 s"):
        forked(server, timeout_s=0.2)
    assert not server.alive, "the next runner is of another one"


def test_a_runner_measures_the_same_whether_it_is_forked_or_not(
    tiny_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not survive a fork, so runners for GPUs are started."""
    settings, job = Settings(home=tmp_path), tiny_job()
    lowest = {decision.key: decision.levels[-1] for decision in plan(job, settings).space.decisions}
    found = []
    for by_fork in (True, False):
        monkeypatch.setattr("autoeff.search.runner_process.forks", lambda device, answer=by_fork: answer)
        with RunnerProcess(job.setup(settings.bank), settings, tmp_path / "log") as runner:
            found.append(runner.evaluate(EvaluationRequest(lowest, "search", 8)).measurements)
            assert runner.pid is not None
            assert (psutil.Process(runner.pid).ppid() == os.getpid()) is not by_fork
    assert found[0] == found[1]
    assert found[0][0].value > 0
