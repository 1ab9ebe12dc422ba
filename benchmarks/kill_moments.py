"""Kills a search, or its runner, with SIGKILL at random moments and compares what is left with an uninterrupted run.

    python benchmarks/kill_moments.py [--moments 25] [--seed 0]

Half of the moments hit the search itself, which `autoeff resume` then finishes; half hit the runner, after which the search goes on by
itself. No finished trial may be lost, none may stand twice, and the final sequence of trials, values included, must be the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

ARGUMENTS = ["demo", "--knobs", "bits,skip", "--limit", "linear_bytes<=0.25x", "--trials", "45", "--windows", "4", "--length", "64"]
ARGUMENTS += ["--eval-windows", "8", "--eval-length", "64"]


@dataclass(frozen=True)
class Kill:
    """One moment.

    Attributes:
        what: The process that is killed.
        after_s: Seconds after the start; the search has then finished `finished` trials.
    """

    what: str
    after_s: float
    finished: int


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "autoeff.cli", *arguments]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "AUTOEFF_HOME": str(home), "COLUMNS": "120"}


def trials(run: Path, home: Path) -> list[dict[str, Any]]:
    """The stored rows of a run; empty before its job exists."""
    out = subprocess.run(command("ls", str(run), "--format", "json"), env=environment(home), capture_output=True, text=True, check=False)
    return json.loads(out.stdout) if out.returncode == 0 else []


def sequence(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be equal: number, configuration, origin, state and every value of every trial."""
    return [
        (row["trial"], row["digest"], row["origin"], row["state"], {name: m["value"] for name, m in row["measurements"].items()})
        for row in rows
    ]


def uninterrupted(arguments: Sequence[str], folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Rows and seconds of a run that nobody disturbs."""
    started = time.monotonic()
    done = subprocess.run(
        command("search", *arguments, "--out", str(folder / "whole")),
        env=environment(folder / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the uninterrupted search failed: {done.stderr[-500:]}")
    return trials(folder / "whole", folder / "home"), time.monotonic() - started


def kill_at(what: str, after_s: float, arguments: Sequence[str], folder: Path) -> tuple[Kill, list[dict[str, Any]]]:
    """Starts a search in a home of its own, kills `what` after a while, lets it end, and returns its rows."""
    home, run = folder / "home", folder / "run"
    folder.mkdir(parents=True)
    begin = command("search", *arguments, "--out", str(run))
    with (folder / "search.log").open("w") as log:
        search = subprocess.Popen(begin, env=environment(home), stdout=log, stderr=log)
        with contextlib.suppress(subprocess.TimeoutExpired):
            search.wait(timeout=after_s)
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it ended before the moment came
            victims = [search] if what == "search" else psutil.Process(search.pid).children()
            for victim in victims:
                os.kill(victim.pid, signal.SIGKILL)
        code = search.wait()
        finished = sum(row["state"] == "succeeded" for row in trials(run, home)) if what == "search" else 0
        if what == "search":  # killed before there was a run, it is started again
            again = command("resume", str(run)) if (run / "run.json").exists() else begin
            code = subprocess.run(again, env=environment(home), stdout=log, stderr=log, check=False).returncode
    if code:
        said = (folder / "search.log").read_text()[-500:]
        raise SystemExit(f"after killing the {what} at {after_s:.2f} s the search ended with {code}: {said}")
    return Kill(what, after_s, finished), trials(run, home)


def check(moments: int, seed: int, folder: Path, arguments: Sequence[str] = ARGUMENTS) -> list[Kill]:
    """Kills the search that `arguments` describe at `moments` random moments.

    Raises:
        AssertionError: A sequence differs from the uninterrupted one.
    """
    expected, seconds = uninterrupted(arguments, folder)
    rng = random.Random(seed)
    kills = []
    for number in range(moments):
        what = ("search", "runner")[number % 2]
        kill, rows = kill_at(what, rng.uniform(0.5, seconds), arguments, folder / str(number))
        assert sequence(rows) == sequence(expected), f"{kill}: the sequence differs from the uninterrupted one"
        kills.append(kill)
        print(
            f"{number + 1:3d} {kill.what:6s} killed at {kill.after_s:5.1f} of {seconds:.1f} s, {kill.finished} trials finished: same sequence of {len(rows)}",
            flush=True,
        )
    return kills


def main(
    moments: Annotated[int, typer.Option(help="How many kills.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        kills = check(moments, seed, Path(temporary))
    print(f"{len(kills)} kills: no finished trial lost, none twice, every final sequence equal to the uninterrupted one")


if __name__ == "__main__":
    typer.run(main)
