"""Forks processes of `autoeff` from one that has imported what they need, since whoever is killed all the time starts all the time.

Reads lines of JSON, `[arguments, variables, log file]`, and answers each with a process id; ends when there are no more.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

MODULES = ("autoeff.api.server", "autoeff.search.celery_app", "autoeff.search.service", "autoeff.search.station", "celery.bin.worker")


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for them
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            become(*json.loads(line))
        print(pid, flush=True)


def become(arguments: Sequence[str], variables: Mapping[str, str], log: str) -> NoReturn:
    """Is `autoeff ARGUMENTS` from now on, in a session of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.environ.update(variables)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.argv = ["autoeff", *arguments]
    from autoeff.cli import main as command

    sys.exit(command())


if __name__ == "__main__":
    main()
