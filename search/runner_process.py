"""Keeps one warm runner process, asks it, and enforces deadline and memory cap from outside.

How a runner ends decides who is to blame (design: failures). SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL and kills by our own
caps are the candidate's; any other death is the plant's and is retried by the caller. After any error the process is thrown
away: the next request starts a fresh one.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from autoeff.errors import CandidateError, FailureClass, InputError, RunnerLost
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, measurement_from_json
from autoeff.search.fork_server import Forked, fork_server
from autoeff.search.printed import Printed
from autoeff.search.settings import Settings
from autoeff.spaces.configuration import Level
from autoeff.spaces.measurements import Measurement

__all__ = ["Measured", "RunnerProcess", "answers", "death_of", "prestart"]

_CANDIDATE_SIGNALS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_WITHHELD = re.compile(
    r"^(AUTOEFF|PYTEST|CELERY|_MP)_|DATABASE_URL|BROKER_URL|PASSW|SECRET|CREDENTIAL|(^|_)(KEY|TOKEN)(_|$)", re.IGNORECASE
)
_FAREWELL_S = 5.0  # for a process that was killed
_TICK_S = 0.1  # between looks at deadline, memory and lease; answers are not delayed by it


@dataclass(frozen=True)
class Measured:
    """An answer to an evaluation.

    Attributes:
        measurements: Quality values.
        seconds: Time inside the runner.
        facts: What else it noted, such as how many linears computed with packed codes.
    """

    measurements: tuple[Measurement, ...]
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)


class RunnerProcess:
    """A runner for one setup, started on first use.

    Attributes:
        digest: Of what the warm process has opened.
        starts: How many processes there were.
        opened_at: When the last one was ready, on the monotonic clock.
        opening_s: Seconds that it took to be.

    Args:
        setup: What it opens.
        settings: Deadlines and memory cap.
        log: File that collects what the runner prints.
        progress: Called with (done, total) while its bank is built.
    """

    def __init__(
        self, setup: EvaluationSetup, settings: Settings, log: Path, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        self._setup, self._settings, self._progress = setup, settings, progress
        self._printed = Printed(log, settings.log_bytes)
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._pending = bytearray()
        self.digest: str | None = None
        self.starts = 0
        self.opened_at, self.opening_s = float("-inf"), 0.0

    def __enter__(self) -> RunnerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def open(self, tick: Callable[[], None] = lambda: None) -> None:
        """Starts the process and loads the model, unless one is warm.

        Raises:
            InputError: The setup cannot be opened.
            RunnerLost: It failed or died while opening, whatever of.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        started = time.monotonic()
        with self._printed.file() as log:
            self._process = self._started(log, tick)
        self.starts += 1
        self._pending.clear()
        setup = replace(self._setup, memory_bytes=self._settings.memory_cap)
        try:
            answer = self._ask({"kind": "open", "setup": setup.to_json()}, self._settings.open_timeout_s, tick)
        except CandidateError as error:  # none is there yet
            raise RunnerLost(f"the runner could not open the job: {error}") from error
        self.digest = answer["digest"]
        self.opened_at = time.monotonic()
        self.opening_s = self.opened_at - started

    def _started(self, log: BinaryIO, tick: Callable[[], None]) -> subprocess.Popen[bytes] | Forked:
        if forks(self._setup.device):
            return fork_server(_environment()).fork(log, self._settings.open_timeout_s, tick)
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "autoeff.evaluators.runner", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches us alone
            env=_environment(),
        )

    def evaluate(self, request: EvaluationRequest, tick: Callable[[], None] = lambda: None) -> Measured:
        """Measures one configuration.

        Raises:
            CandidateError: It failed, with its class.
            RunnerLost: The process died of something else.
        """
        message = {"kind": "evaluate", "levels": dict(request.levels), "split": request.split, "windows": request.windows}
        return self._measured(self.ask(message, tick))

    def remeasure(self, folder: Path, split: str, windows: int, levels: Mapping[str, Level]) -> Measured:
        """Measures the model found in `folder`, with those of `levels` that are about its cache, against the dense model of the setup."""
        message = {"kind": "remeasure", "folder": str(folder), "split": split, "windows": windows, "levels": dict(levels)}
        return self._measured(self.ask(message))

    def remeasure_adapter(self, folder: Path, split: str, windows: int) -> Measured:
        """Measures the dense model with the adapter found in `folder`."""
        return self._measured(self.ask({"kind": "remeasure_adapter", "folder": str(folder), "split": split, "windows": windows}))

    def trained(self, levels: Mapping[str, Level]) -> Measured:
        """Trains the adapters of a configuration from scratch, and measures it on the whole held-out text."""
        return self._measured(self.ask({"kind": "trained", "levels": dict(levels)}))

    def ask(self, message: Mapping[str, Any], tick: Callable[[], None] = lambda: None) -> Mapping[str, Any]:
        """Sends one request to the warm runner and returns its answer. Raises as `evaluate`."""
        self._printed.begin()
        self.open(tick)
        return self._ask(message, self._settings.evaluation_timeout_s, tick)

    def close(self) -> None:
        """Ends the process, if any, and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with _ignoring_broken_pipe():
                    stream.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        with suppress(ProcessLookupError):  # nobody of its session is left
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # who would tell of its end does not
            process.wait(_FAREWELL_S)

    def log_tail(self) -> str:
        """The end of what the runner printed since the last request."""
        return self._printed.tail()

    @staticmethod
    def _measured(answer: Mapping[str, Any]) -> Measured:
        measurements = tuple(measurement_from_json(m) for m in answer["measurements"])
        return Measured(measurements, float(answer["seconds"]), answer.get("facts", {}))

    def _ask(self, message: Mapping[str, Any], timeout_s: float, tick: Callable[[], None]) -> Mapping[str, Any]:
        try:
            return self._exchange(message, timeout_s, tick)
        except BaseException:
            self._kill()
            raise

    def _exchange(self, message: Mapping[str, Any], timeout_s: float, tick: Callable[[], None]) -> Mapping[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with _ignoring_broken_pipe():  # a dead process is seen below, with its exit status
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        assert process.stdout is not None
        for answer in answers(process.stdout.fileno(), process.pid, self._pending, self._settings, timeout_s, self._printed.watched(tick)):
            match answer["kind"]:
                case "progress":
                    self._progress(answer["done"], answer["total"])
                case "failed":
                    raise CandidateError(FailureClass(answer["class"]), answer["message"])
                case "refused":
                    raise InputError(answer["message"])
                case "lost":
                    raise RunnerLost(answer["message"])
                case _:
                    return answer
        raise self._death(process)

    def _death(self, process: subprocess.Popen[bytes] | Forked) -> Exception:
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return RunnerLost("the runner closed its output but did not end")
        return death_of(code)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self.close()


def answers(
    fd: int, pid: int, pending: bytearray, settings: Settings, timeout_s: float, tick: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """The JSON lines that process `pid` writes to the pipe `fd` until it closes it.

    Args:
        fd: To be read.
        pid: Whose memory is watched.
        pending: What was read before and not yet taken.
        settings: Hold the memory cap.
        timeout_s: From now on.
        tick: Called ten times a second, also while progress is reported.

    Raises:
        CandidateError: No answer in time, one that is no JSON, or too much memory held.
    """
    looked = time.monotonic()
    deadline = looked + timeout_s
    watched = _process(pid)
    cap, answering = settings.memory_cap, False
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            while b"\n" in pending:
                line, _, rest = pending.partition(b"\n")
                pending[:] = rest
                yield _parsed(line)
            if time.monotonic() >= looked + _TICK_S:  # behind the answers: the last one of a process that has ended counts
                looked = time.monotonic()
                tick()
                if not answering and time.monotonic() > deadline:
                    raise CandidateError(FailureClass.TIMEOUT, f"no answer within {timeout_s:g} s")
                if not answering and (held := _resident(watched)) > cap:
                    raise CandidateError(FailureClass.OOM_HOST, f"held {held / 2**30:.2f} GiB; the cap is {cap / 2**30:.2f} GiB")
            answering = bool(selector.select(_TICK_S))
            if answering:
                data = os.read(fd, 1 << 20)
                if not data:
                    return
                pending += data


def _parsed(line: bytes | bytearray) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(answer := json.loads(line), dict) and "kind" in answer:
            return answer
    raise CandidateError(FailureClass.INVALID, f"answered {bytes(line[:80])!r}, which is no answer")


def death_of(code: int) -> Exception:
    """What it means that a runner ended with the exit code `code`, minus a signal's number where one ended it."""
    if code < 0 and -code in _CANDIDATE_SIGNALS:
        return CandidateError(FailureClass.CRASH, f"the runner died of {signal.Signals(-code).name}")
    reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return RunnerLost(f"the runner ended with {reason}")


def prestart(device: str) -> None:
    """Begins with what every runner on this device needs, while the caller does other things."""
    if forks(device):
        fork_server(_environment())


def forks(device: str) -> bool:
    """Whether runners on this device are forked: a CUDA context does not survive that, and only Linux ends them with their parent."""
    return device == "cpu" and sys.platform == "linux" and _tells_of_ends()


@cache
def _tells_of_ends() -> bool:
    """Whether this kernel, its sandbox and this build of Python let a process wait for others by descriptor."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _environment() -> dict[str, str]:
    """Without what opens other doors: a runner needs no database, broker, server or hub. Those who share a fork server have the same."""
    kept = {name: value for name, value in os.environ.items() if not _WITHHELD.search(name)}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _process(pid: int) -> psutil.Process | None:
    """None where it has ended already, which is seen when nothing comes from it."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def _resident(process: psutil.Process | None) -> int:
    with suppress(psutil.NoSuchProcess):
        return 0 if process is None else int(process.memory_info().rss)
    return 0


@contextmanager
def _ignoring_broken_pipe() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, ValueError):  # ValueError: flushing on close after the pipe broke
        return
