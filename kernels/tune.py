"""Finds a fast configuration of every kernel for the GPU at hand and leaves them in `tuning/<device>.json`.

    python -m autoeff.kernels.tune [--ops linear_wq,moe] [--rounds N]

For each entry of `tuning/default.json`: from its configuration on, one number at a time is halved or doubled, and the fastest neighbour is
the next start, until none is faster by 2 %. A configuration serves all widths of a kernel, so what counts is the sum over them. One that
does not compile, does not fit, or gives another result is dropped. The last one is timed once more after the default, which stays unless
the other is faster by 2 %.

One process a device: a second one ends at once. Every timing is kept in `tuning/<device>.log`, so that an interrupted run goes on where it
was; timings of other sources, versions or devices do not count. Entries that were not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autoeff.kernels import tuned
from autoeff.kernels.failures import out_of_memory
from autoeff.kernels.problems import OPS, Problem, problems
from autoeff.kernels.timing import measure

__all__ = ["BOUNDS", "Log", "climb", "locked", "main", "neighbours", "write"]

BOUNDS: Mapping[str, tuple[int, int]] = {
    "block_n": (1, 256), "block_m": (16, 256), "block_k": (16, 512), "block_c": (4, 64), "block_l": (16, 128), "splits": (1, 64),
    "shrink_splits": (1, 16), "warps": (1, 8), "packed_warps": (1, 8), "stages": (1, 8),
}  # fmt: skip
"""Least and greatest value of every number of a configuration."""
_GAIN = 0.98
_TOLERANCE = 2e-2
"""Relative error against the default configuration: bfloat16 results, differently split sums."""

Config = dict[str, Any]


class Log:
    """Times in microseconds by (op, sizes, configuration), kept on disk a line each; None for a configuration that is no good.

    Args:
        path: Read now if it exists, appended to later; a torn last line is dropped.
        about: What a time depends on beside its key; lines of others do not count.
    """

    def __init__(self, path: Path, about: str) -> None:
        self._path, self._about = path, about
        self._times: dict[str, float | None] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if found["about"] == about:
                self._times[found["key"]] = found["us"]

    def time(self, op: str, sizes: Mapping[str, int], config: Config, run: Callable[[Config], float | None]) -> float | None:
        """The known time, else that of `run`, which is kept."""
        key = json.dumps([op, sizes, config], sort_keys=True)
        if key not in self._times:
            self._times[key] = run(config)
            line = json.dumps({"about": self._about, "key": key, "us": self._times[key]})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return self._times[key]


def neighbours(config: Config) -> list[Config]:
    """Every configuration with one number halved or doubled, inside `BOUNDS`."""
    found = []
    for name, (low, high) in BOUNDS.items():
        if name in config:
            for value in {config[name] // 2, config[name] * 2}:
                if low <= value <= high:
                    found.append({**config, name: value})
    return found


def climb(start: Config, time: Callable[[Config], float | None]) -> Config:
    """The configuration that no neighbour beats by 2 %.

    Raises:
        ValueError: The start itself has no time.
    """
    best, least = start, time(start)
    if least is None:
        raise ValueError(f"the default configuration does not run: {start}")
    while True:
        times = [(found, config) for config in neighbours(best) if (found := time(config)) is not None]
        fastest, config = min(times, key=lambda pair: pair[0], default=(math.inf, best))
        if fastest >= least * _GAIN:
            return best
        best, least = config, fastest


def write(path: Path, op: str, entries: list[Config]) -> None:
    """Puts the entries of an operation into the file; others stay. It is never half written."""
    all_entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    all_entries[op] = entries
    blocks = [f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(entry)}" for entry in all_entries[name]) + "\n  ]" for name in all_entries]
    fresh = path.with_suffix(".new")
    fresh.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    fresh.replace(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file for one process.

    Raises:
        BlockingIOError: Another process has it.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _timer(solved: list[Problem], device: torch.device, rounds: int, start: Config) -> Callable[[Config], float | None]:
    """The sum over the problems in microseconds; None if one fails or differs from the start's result."""
    expected = [problem.tuned(start).float().clone() for problem in solved]

    def run(config: Config) -> float | None:
        try:
            for problem, exact in zip(solved, expected, strict=True):
                found = problem.tuned(config).float()
                if not bool((found - exact).norm() <= _TOLERANCE * exact.norm()):  # NaN fails too
                    return None
            calls = {problem.variant: lambda problem=problem: problem.tuned(config) for problem in solved}
            return sum(timing.median_us for timing in measure(calls, device, rounds).values())
        except Exception as error:
            if not _does_not_run(error):
                raise
            return None

    return run


def _does_not_run(error: Exception) -> bool:
    """Whether an error is a configuration's own: it does not compile, or does not fit. Others would be kept as if they were."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # passes of the compiler fail without an error of their own
    return isinstance(error, CompilationError | OutOfResources | PTXASError) or out_of_memory(error) or "PassManager::run" in str(error)


def _tune(op: str, device: torch.device, rounds: int, log: Log) -> list[Config]:
    entries = []
    for entry in tuned.configurations(op):
        sizes = {name: entry[name] for name in tuned.SIZES}
        start = {name: value for name, value in entry.items() if name not in sizes}
        if not BOUNDS.keys() & start.keys():  # a product of the library
            entries.append(dict(entry))
            continue
        solved = problems(op, **sizes, device=device, dtype=torch.bfloat16)
        run = _timer(solved, device, rounds, start)
        best = climb(start, lambda config, sizes=sizes, run=run: log.time(op, sizes, config, run))  # type: ignore[misc]
        if best != start:  # once more, one after the other
            before, after = run(start), run(best)
            if before is None or after is None or after > before * _GAIN:
                best = start
        entries.append({**sizes, **best})
        print(f"{op} {sizes}: {tuned.label(best)}", flush=True)  # noqa: T201
    return entries


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m autoeff.kernels.tune", description="Tunes the kernels of autoeff for this GPU.")
    parser.add_argument("--ops", default=",".join(OPS), help="operations, separated by commas")
    parser.add_argument("--rounds", type=int, default=20, help="replays of a timing, at least 2")
    options = parser.parse_args(arguments)
    ops = options.ops.split(",")
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"no {unknown[0]!r}; allowed: {', '.join(OPS)}")
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2: got {options.rounds}")
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to tune here", file=sys.stderr)  # noqa: T201
        return 2
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    target = tuned.path_of(name)
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).resolve().parent.glob("*.py")))).hexdigest()
    try:
        with locked(target.with_suffix(".lock")):
            log = Log(target.with_suffix(".log"), f"{name}, triton {triton.__version__}, torch {torch.__version__}, source {source[:16]}")
            for op in ops:
                write(target, op, _tune(op, device, options.rounds, log))
    except BlockingIOError:
        print(f"another process is tuning for {name}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
