"""Kills a search, or its runner, with SIGKILL at random moments and compares what is left with an uninterrupted run.

    python benchmarks/kill_moments.py [--moments 25] [--seed 0]

A third of the moments hit the search itself, which `autoeff resume` then finishes; the others hit the runner or the process that forks
runners, after which the search goes on by itself. No finished trial may be lost, none may stand twice, and the final sequence of trials, values included, must be the same.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psutil
import typer

from autoeff.errors import InputError
from autoeff.search.results import rows_of
from autoeff.search.runs import open_run
from autoeff.search.settings import Settings
from autoeff.search.storage import Store

T = TypeVar("T")

ARGUMENTS = ["demo", "--knobs", "bits,skip", "--limit", "linear_bytes<=0.25x", "--trials", "45", "--windows", "4", "--length", "64"]
ARGUMENTS += ["--eval-windows", "8", "--eval-length", "64"]


@dataclass(frozen=True)
class Kill:
    """One moment.

    Attributes:
        what: The process that is killed.
        after: Trials that had ended.
    """

    what: str
    after: int


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "autoeff.cli", *arguments]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "AUTOEFF_HOME": str(home), "COLUMNS": "120"}


def trials(run: Path) -> list[dict[str, Any]]:
    """The stored rows of a run; empty before its job exists."""
    return _read(run, rows_of) or []


def ended(run: Path) -> int:
    """How many trials of a run have ended."""
    counts = _read(run, Store.counts)
    return 0 if counts is None else counts.trials - counts.open


def _read(run: Path, read: Callable[[Store, str], T]) -> T | None:
    if not (run / "run.json").exists():
        return None
    try:
        opened = open_run(run, Settings())
    except InputError:  # the folder is there before the job
        return None
    with opened.store as store:
        return read(store, opened.job_id)


def sequence(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be equal: number, configuration, origin, state and every value of every trial."""
    return [
        (row["trial"], row["digest"], row["origin"], row["state"], {name: m["value"] for name, m in row["measurements"].items()})
        for row in rows
    ]


def uninterrupted(arguments: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Rows of a run that nobody disturbs."""
    begin = command("search", *arguments, "--out", str(folder / "whole"))
    done = subprocess.run(begin, env=environment(folder / "home"), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the uninterrupted search failed: {done.stderr[-500:]}")
    return trials(folder / "whole")


def kill_at(what: str, after: int, pause_s: float, arguments: Sequence[str], folder: Path) -> tuple[Kill, list[dict[str, Any]]]:
    """Starts a search in a home of its own, kills `what` when so many trials have ended, lets it end, and returns its rows."""
    home, run = folder / "home", folder / "run"
    folder.mkdir(parents=True)
    begin = command("search", *arguments, "--out", str(run))
    with (folder / "search.log").open("w") as log:
        search = subprocess.Popen(begin, env=environment(home), stdout=log, stderr=log)
        while ended(run) < after and search.poll() is None:
            time.sleep(0.01)
        time.sleep(pause_s)
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it ended before the moment came
            children = psutil.Process(search.pid).children(recursive=True)
            victims = {"search": [search], "fork server": children[:1], "runner": children[1:]}
            for victim in victims[what]:
                os.kill(victim.pid, signal.SIGKILL)
        kill = Kill(what, ended(run))
        code = search.wait()
        if what == "search":  # killed before there was a run, it is started again
            again = command("resume", str(run)) if (run / "run.json").exists() else begin
            code = subprocess.run(again, env=environment(home), stdout=log, stderr=log, check=False).returncode
    if code:
        said = (folder / "search.log").read_text()[-500:]
        raise SystemExit(f"after {kill} the search ended with {code}: {said}")
    return kill, trials(run)


def check(moments: int, seed: int, folder: Path, arguments: Sequence[str], expected: Sequence[dict[str, Any]]) -> list[Kill]:
    """Kills the search that `arguments` describe at `moments` random moments.

    Raises:
        AssertionError: A sequence differs from the `expected` one, that of an undisturbed search.
    """
    rng = random.Random(seed)
    kills = []
    for number in range(moments):
        what = ("search", "runner", "fork server")[number % 3]
        kill, rows = kill_at(what, rng.randrange(len(expected)), rng.uniform(0.0, 0.1), arguments, folder / str(number))
        assert sequence(rows) == sequence(expected), f"{kill}: the sequence differs from the uninterrupted one"
        kills.append(kill)
        print(f"{number + 1:3d} {kill.what:11s} killed after {kill.after} trials: same sequence of {len(rows)}", flush=True)
    return kills


def main(
    moments: Annotated[int, typer.Option(help="How many kills.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kills = check(moments, seed, folder, ARGUMENTS, uninterrupted(ARGUMENTS, folder))
    print(f"{len(kills)} kills: no finished trial lost, none twice, every final sequence equal to the uninterrupted one")


if __name__ == "__main__":
    typer.run(main)
