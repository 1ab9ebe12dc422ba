"""Measures candidates of the user's own code, each in a process forked from this one.

A fork has the functions, closures and data of its parent at no cost, so nothing has to be importable and a notebook will do. What
it does, a crash, a hang, memory without end, ends with it and is written down as that candidate's failure.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from autoeff.errors import CandidateError, FailureClass, InputError
from autoeff.evaluators.metrics import Metric, values_of
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.printed import Printed
from autoeff.search.runner_process import Measured, answers, death_of
from autoeff.search.settings import Settings
from autoeff.spaces.configuration import Level
from autoeff.spaces.measurements import Measurement

__all__ = ["Build", "ForkedRunner"]

Build = Callable[[dict[str, Any]], Any]
"""From a configuration, a level for every name, to a candidate."""
_MESSAGE_CHARACTERS = 500
_FAREWELL_S = 5.0  # for a process that closed its output to end
_PR_SET_PDEATHSIG = 1


class ForkedRunner:
    """Builds and measures one candidate per process.

    Before each candidate the generators of Python, numpy and torch are seeded with the same number, so that candidates differ by
    their configurations alone. Torch runs on one thread there: the threads of OpenMP do not survive a fork.

    Args:
        build: Makes the candidate.
        metrics: Measure it, by name.
        needed: Names that every candidate must be measured under: those of objectives and limits.
        reference: The reference configuration; a name that is missing there is missing everywhere.
        seed: Of the job.
        settings: Deadline and memory cap of a candidate.
        log: File that collects what candidates print.
    """

    def __init__(
        self,
        build: Build,
        metrics: Mapping[str, Metric],
        needed: Sequence[str],
        reference: Mapping[str, Level],
        seed: int,
        settings: Settings,
        log: Path,
    ) -> None:
        self._build, self._metrics, self._needed, self._reference = build, metrics, needed, dict(reference)
        self._seed, self._settings = seed, settings
        self._printed = Printed(log, settings.log_bytes)

    def evaluate(self, request: EvaluationRequest, tick: Callable[[], None] = lambda: None) -> Measured:
        """Measures one configuration.

        Raises:
            CandidateError: It raised, crashed, hung, took too much memory, or gave no finite number.
            RunnerLost: Its process was killed from outside.
            InputError: The reference configuration is not measured under a name that an objective or a limit has.
        """
        started = time.monotonic()
        self._printed.begin()
        timeout_s = self._settings.evaluation_timeout_s
        with _Child(lambda pipe: self._measure(request.levels, pipe)) as child:
            for answer in answers(
                child.pipe, child.pid, bytearray(), self._settings, timeout_s, child.watched(self._printed.watched(tick))
            ):
                if answer["kind"] == "failed":
                    raise CandidateError(FailureClass(answer["class"]), answer["message"])
                self._check(request.levels, answer["values"])
                values = tuple(Measurement(name, value, own=True) for name, value in answer["values"].items())
                return Measured(values, time.monotonic() - started)
            raise child.death()

    def log_tail(self) -> str:
        """The end of what the last candidate printed, its traceback included."""
        return self._printed.tail()

    def close(self) -> None:
        """Nothing is left running between candidates."""

    def _check(self, levels: Mapping[str, Level], values: Mapping[str, float]) -> None:
        for name in self._needed:
            if name not in values:
                message = f"no metric gave {name!r}, which objectives or limits name; there were {', '.join(sorted(values)) or 'none'}"
                raise InputError(message) if dict(levels) == self._reference else CandidateError(FailureClass.INVALID, message)
        for name, value in values.items():
            if not math.isfinite(value):
                raise CandidateError(FailureClass.NAN, f"{name} is {value}")

    # In the forked process

    def _measure(self, levels: Mapping[str, Level], pipe: int) -> None:
        """Writes the answer of a candidate to `pipe`."""
        with self._printed.file() as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123  (a file descriptor is wanted)
            os.dup2(nothing.fileno(), 0)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        faulthandler.enable(file=sys.stderr)
        try:
            self._seed_all()
            answer = {"kind": "measured", "values": self._values(levels)}
        except BaseException as error:  # whatever the user's code raises, SystemExit included
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}".strip().splitlines()[0][:_MESSAGE_CHARACTERS]
            answer = {"kind": "failed", "class": str(_class_of(error)), "message": message}
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(pipe, "wb") as out:
            out.write(json.dumps(answer).encode() + b"\n")

    def _seed_all(self) -> None:
        random.seed(self._seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(self._seed)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(1)
            torch.manual_seed(self._seed)

    def _values(self, levels: Mapping[str, Level]) -> dict[str, float]:
        return values_of(self._metrics, self._build(dict(levels)))


class _Child:
    """A forked process that writes to a pipe; it ends, and all that it started, with the context.

    Args:
        work: Called in the child with the file descriptor to write to.
    """

    def __init__(self, work: Callable[[int], None]) -> None:
        self._ended = False
        self.pipe, writing = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError, OSError):  # none, closed, or a reader that left
                stream.flush()
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 and later: threads of this process are not in the child, which is documented and seen to in `_seed_all`.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _work(work, writing, parent)
        os.close(writing)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        os.close(self.pipe)

    def watched(self, tick: Callable[[], None]) -> Callable[[], None]:
        """`tick`, and a look whether the process is dead while something that it started keeps the pipe open."""
        looks = [False]

        def look() -> None:
            tick()
            if looks[0]:  # dead at the last look already, and nothing has come since
                raise self.death()
            looks[0] = self._is_dead()

        return look

    def death(self) -> Exception:
        """What it means that the process ended without an answer."""
        deadline = time.monotonic() + _FAREWELL_S
        while not self._is_dead():
            if time.monotonic() > deadline:
                return CandidateError(FailureClass.CRASH, "the candidate closed its output and gave no value")
            time.sleep(0.01)
        code = self._end()
        if code >= 0:
            return CandidateError(FailureClass.CRASH, f"the candidate ended its process with exit code {code}")
        return death_of(code)

    def _is_dead(self) -> bool:
        return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)

    def _end(self) -> int:
        """Kills the process and its group, and returns the exit code."""
        if self._ended:
            return 0
        self._ended = True
        for kill in (os.killpg, os.kill):  # both: it may not lead a group yet
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _work(work: Callable[[int], None], pipe: int, parent: int) -> NoReturn:
    """The life of the child. Nothing of the parent's is closed, flushed or finalised on the way out."""
    try:
        os.setsid()  # Ctrl-C reaches the parent alone, and what the candidate starts can be killed with it
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            work(pipe)
    finally:
        os._exit(0)


def _class_of(error: BaseException) -> FailureClass:
    if isinstance(error, CandidateError):
        return error.failure
    if isinstance(error, MemoryError):
        return FailureClass.OOM_HOST
    return FailureClass.OOM_GPU if type(error).__name__ == "OutOfMemoryError" else FailureClass.INVALID
