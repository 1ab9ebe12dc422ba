"""Kills a process at a named step. Python imports this module by itself where its folder is on PYTHONPATH.

A trap is a file with the name of the step in the folder `TRAPS`: whoever comes to that step first removes the file and is killed
there and then, by SIGKILL. `CLOCK_AHEAD_S` sets the clock of a process wrong by so many seconds. Both may be set for a process that was
forked from one that has imported everything, so they are looked up where they count.
"""

from __future__ import annotations

import functools
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

STEPS: dict[str, dict[str, tuple[str, str, str]]] = {
    "worker": {
        "message_taken": ("autoeff.search.station", "Station.evaluate", "before"),
        "claim_uncommitted": ("autoeff.search.storage.leases", "take", "after"),
        "claim_committed": ("autoeff.search.storage.work", "Work.claim", "after"),
        "runner_opening": ("autoeff.evaluators.evaluator", "Evaluator.__init__", "before"),
        "runner_evaluating": ("autoeff.evaluators.evaluator", "Evaluator.evaluate", "before"),
        "runner_measured": ("autoeff.evaluators.evaluator", "Evaluator.evaluate", "after"),
        "result_uncommitted": ("autoeff.search.storage.leases", "decide", "after"),
        "result_committed": ("autoeff.search.storage.work", "Work.complete", "after"),
    },
    "coordinator": {
        "before_proposal": ("autoeff.search.storage.trials", "Trials.propose", "before"),
        "proposal_uncommitted": ("autoeff.search.storage.trials", "queued", "after"),
        "proposal_committed": ("autoeff.search.storage.trials", "Trials.propose", "after"),
        "before_message": ("celery.app.task", "Task.apply_async", "before"),
        "message_sent": ("celery.app.task", "Task.apply_async", "after"),
        "sampler_told": ("autoeff.search.study", "Study.tell", "after"),
        "before_end": ("autoeff.search.results", "Results.summary", "before"),
    },
    "serve": {
        "job_uncommitted": ("autoeff.search.storage.leases", "note", "after"),
        "job_committed": ("autoeff.search.storage.jobs", "Jobs.create_job", "after"),
    },
}
"""By command and step: module, function, and whether before or after it. Runners are processes of workers."""


class _Setting(MetaPathFinder):
    """Puts traps around functions of modules, as those are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        mine = {step: place for steps in STEPS.values() for step, place in steps.items() if place[0] == name}
        spec = importlib.machinery.PathFinder.find_spec(name, path) if mine else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for step, (_, function, moment) in mine.items():
                *owners, last = function.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, last, _trapped(getattr(owner, last), step, moment))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _trapped(function: Callable[..., Any], step: str, moment: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            _spring(step)
        result = function(*args, **kwargs)
        if moment == "after":
            _spring(step)
        return result

    return call


def _spring(step: str) -> None:
    try:
        Path(os.environ["TRAPS"], step).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


if "TRAPS" in os.environ:
    sys.meta_path.insert(0, _Setting())
    _time = time.time
    time.time = lambda: _time() + float(os.environ.get("CLOCK_AHEAD_S", "0"))
