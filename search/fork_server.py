"""Has runners forked by a process that has imported what they need (`evaluators/fork_server.py`)."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import IO, BinaryIO

from autoeff.errors import RunnerLost

__all__ = ["ForkServer", "Forked", "fork_server"]

_TICK_S = 0.1
_SAID_BYTES = 500  # of its last words

_lock = threading.Lock()
_last: ForkServer | None = None


def fork_server(environment: Mapping[str, str]) -> ForkServer:
    """The server of this process, or of the one that it was forked from, whose runners have these environment variables.

    It is started if need be; then it imports while the caller does other things.
    """
    global _last
    with _lock:
        if _last is None or _last.environment != environment or not _last.alive:
            _last = ForkServer(environment)
        return _last


class ForkServer:
    """A process that forks runners. It ends with those who can ask it, and when it is replaced and its last runner is forgotten.

    Attributes:
        environment: Of the runners.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._late = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        self._socket, theirs = _sockets()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "autoeff.evaluators.fork_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                start_new_session=True,  # Ctrl-C reaches us alone
                env=self.environment,
            )
        weakref.finalize(self, _end, os.getpid(), self._socket, self._process, self._said)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._late and not _readable(self._socket, 0.0)  # it says nothing there, so it would have closed its end

    def fork(self, log: BinaryIO, timeout_s: float, tick: Callable[[], None]) -> Forked:
        """A runner.

        Args:
            log: An open file for all that it prints beside its answers.
            timeout_s: Until it must be there.
            tick: Called ten times a second while the server still imports.

        Raises:
            RunnerLost: It is not there in time, or the server has ended.
        """
        with ExitStack() as ours, ExitStack() as theirs:
            reading, asking = _pipe(theirs, ours)
            answers, writing = _pipe(ours, theirs)
            status, told = _sockets()
            ours.enter_context(status)
            theirs.enter_context(told)
            folder = os.open(".", os.O_PATH)
            theirs.callback(os.close, folder)
            with suppress(OSError):  # the server has ended, which is seen below
                socket.send_fds(self._socket, [b"1"], [reading.fileno(), writing.fileno(), log.fileno(), folder, told.fileno()])
            theirs.close()
            deadline = time.monotonic() + timeout_s
            while not _readable(status, _TICK_S):
                tick()
                if time.monotonic() > deadline:
                    self._late = True
                    raise RunnerLost(f"no runner within {timeout_s:g} s")
            if not (pid := status.recv(16)):
                raise RunnerLost(f"no runner could be forked: {self._last_words()}")
            ours.pop_all()
            return Forked(self, int(pid), asking, answers, status)

    def _last_words(self) -> str:
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _SAID_BYTES))
        return self._said.read().decode(errors="replace").strip().rpartition("\n")[2] or "it said nothing"


class Forked:
    """A process that another one has forked for us, with as much of `subprocess.Popen` as a runner's keeper needs.

    Attributes:
        pid: Of the process.
        stdin: Where requests go.
        stdout: Where answers come from.
    """

    def __init__(self, server: ForkServer, pid: int, stdin: IO[bytes], stdout: IO[bytes], status: socket.socket) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._server = server  # which would end without us
        self._status = status
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus a signal's number where one ended it; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        if self._code is None:
            if not _readable(self._status, timeout):
                raise subprocess.TimeoutExpired("runner", timeout or 0.0)
            self._code = int(self._status.recv(16) or -signal.SIGKILL)  # with its parent, the server, it is killed
            self._status.close()
        return self._code

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _pipe(reading: ExitStack, writing: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """A pipe whose ends are closed with these."""
    ends = os.pipe()
    return reading.enter_context(open(ends[0], "rb")), writing.enter_context(open(ends[1], "wb"))  # noqa: PTH123  (file descriptors)


def _readable(sock: socket.socket, timeout_s: float | None) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else 1000 * timeout_s))


def _sockets() -> tuple[socket.socket, socket.socket]:
    """A pair that keeps messages apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _end(owner: int, asking: socket.socket, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    for ours in (asking, said):
        ours.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()
