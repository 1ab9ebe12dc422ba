"""A process that has imported what every runner needs, and forks runners (`python -m autoeff.evaluators.fork_server FD`).

A runner is there in a tenth of a second instead of seconds, and shares the memory of its libraries with the next one. A CUDA context does
not survive a fork, so this is for runners that compute on a CPU.

Each message on the socket FD asks for a runner; with it come file descriptors: its standard input, output and error, its working
directory, and a socket on which its pid is told, and later its exit code. A runner whose socket is closed is killed; when FD is closed,
everything ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
import warnings
from typing import NoReturn

__all__ = ["load", "main"]

_DESCRIPTORS = 5
"""That come with a request."""


def main() -> int:
    """Serves requests until nobody can make one; returns the exit code."""
    asked = socket.socket(fileno=int(sys.argv[1]))
    load("autoeff.evaluators.runner")
    told: dict[int, socket.socket] = {}
    parent = os.getpid()
    with selectors.DefaultSelector() as selector:

        def start() -> bool:
            message, descriptors, _, _ = socket.recv_fds(asked, 1, _DESCRIPTORS)
            if not message:
                return False  # the runners get SIGKILL, as their parent dies
            *others, status = descriptors
            try:
                pid = _fork()
            except OSError:  # no room for a process now; whoever asked sees the socket closed
                traceback.print_exc()
                os.close(status)
            else:
                if pid == 0:
                    selector.close()
                    for other in (asked, *told.values()):
                        other.close()
                    _run(descriptors, parent)
                told[pid] = socket.socket(fileno=status)
                _tell(told[pid], pid)
                selector.register(told[pid], selectors.EVENT_READ, lambda: forget(pid))
                ended = os.pidfd_open(pid)
                selector.register(ended, selectors.EVENT_READ, lambda: bury(pid, ended))
            for descriptor in others:
                os.close(descriptor)
            return True

        def forget(pid: int) -> bool:
            """Whoever asked for the runner is gone."""
            if pid not in told:  # and so is the runner
                return True
            selector.unregister(told[pid])
            with contextlib.suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return True

        def bury(pid: int, ended: int) -> bool:
            selector.unregister(ended)
            os.close(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with told.pop(pid) as status, contextlib.suppress(KeyError):
                _tell(status, code)
                selector.unregister(status)
            return True

        selector.register(asked, selectors.EVENT_READ, start)
        while True:
            for key, _ in selector.select():
                if not key.data():
                    return 0


def load(module: str) -> None:
    """Imports what a process and all that are forked from it need."""
    gc.disable()  # all of it stays, and looking through it for garbage takes a fifth of the time
    importlib.import_module(module)
    gc.freeze()
    gc.enable()


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 and later: numpy's idle threads are not in the child; it starts its own there.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _run(descriptors: list[int], parent: int) -> NoReturn:
    """The life of a runner."""
    code = 1
    try:
        from autoeff.evaluators import runner

        os.setsid()  # it can be killed with all that it starts
        *standard, folder, _ = descriptors
        os.fchdir(folder)
        if not sys.flags.safe_path:
            sys.path[0] = ""  # as for any `python -m`: modules are looked for where the search was started
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
        for descriptor in descriptors:
            os.close(descriptor)
        code = runner.main(parent)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _tell(status: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        status.send(str(number).encode())


if __name__ == "__main__":
    sys.exit(main())
