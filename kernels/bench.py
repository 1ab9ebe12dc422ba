"""Times every operation beside the 16-bit path and what a user would pick instead, with the least time that bytes and operations allow.

    python -m autoeff.kernels.bench [--ops linear_wq,moe] [--models demo,llama-3-8b] [--phases decode,prefill] [--rounds N] [--out DIR]

Shapes are those of the linears, the attention and the FFN of Llama-3-8B and of the bundled model `demo`; for mixtures of experts, eight
FFNs of that size. On a GPU the Triton kernels run; on a CPU its own paths run, and the head of the table says so: such times tell nothing
about a GPU. The floor is the greater of bytes / bandwidth and operations / rate, both measured on this device just before; `share` is
floor / time. On a CPU a problem that fits into the last cache has no share, since its bytes need not come from memory. 8-bit products count
at the 16-bit rate. Prints Markdown; `--out` leaves `kernels.json` and `kernels.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autoeff.kernels.problems import OPS, Problem, problems
from autoeff.kernels.timing import Limits, limits, measure

__all__ = ["MODELS", "Model", "Row", "bench", "main", "markdown", "shapes"]


@dataclass(frozen=True)
class Model:
    """What a benchmark needs to know of a model: hidden, FFN and KV sizes, heads, and the context lengths that are timed."""

    hidden: int
    ffn: int
    kv_heads: int
    heads: int
    head_size: int
    contexts: tuple[int, ...]
    prefill: int
    block: int


MODELS = {
    "demo": Model(192, 448, 2, 6, 32, (512,), 512, 64),
    "llama-3-8b": Model(4096, 14336, 8, 32, 128, (4096, 32768), 4096, 128),
}


@dataclass(frozen=True)
class Row:
    """One path on one problem.

    Attributes:
        op, variant, model, phase: The problem.
        m, n, k: Its sizes, as in `tuning/default.json`.
        path: Who solved it.
        kind: `autoeff`, `dense` or `other`.
        median_us, low_us, high_us: Time and quartiles; None where it could not run.
        speed: Against the first dense path of the same problem.
        moved_bytes, flops: Of the operation; None for paths that are not ours.
        floor_us: The least time for them.
        share: floor / time; None where there is no floor.
        note: The clock, or why it could not run.
    """

    op: str
    variant: str
    model: str
    phase: str
    m: int
    n: int
    k: int
    path: str
    kind: str
    median_us: float | None
    low_us: float | None
    high_us: float | None
    speed: float | None
    moved_bytes: int | None
    flops: int | None
    floor_us: float | None
    share: float | None
    note: str


def shapes(op: str, model: Model, phase: str) -> Iterator[tuple[int, int, int]]:
    """The sizes `m`, `n`, `k` at which an operation is timed."""
    tokens = (1, 16) if phase == "decode" else (model.prefill,)
    if op == "attention_decode":
        if phase == "decode":
            yield from ((model.kv_heads, context, model.head_size) for context in model.contexts)
    elif op == "attention_block_sparse":
        if phase == "prefill":
            yield model.prefill, model.block, model.head_size
    elif op == "kv_evict":
        if phase == "prefill":
            yield from ((model.kv_heads, context, model.head_size) for context in model.contexts)
    elif op == "ffn_sparse":
        if phase == "decode":
            yield 1, model.ffn, model.hidden
    elif op.startswith("moe"):
        yield 1 if phase == "decode" else max(1, model.prefill // 4), 2 * model.ffn, model.hidden
    else:
        kv = model.kv_heads * model.head_size
        for m in tokens:
            for n, k in ((model.hidden, model.hidden), (kv, model.hidden), (model.ffn, model.hidden), (model.hidden, model.ffn)):
                yield m, n, k


def bench(ops: list[str], models: list[str], phases: list[str], device: torch.device, rounds: int, found: Limits) -> Iterator[Row]:
    """The rows of all problems, as they are measured; all paths of a shape alternate."""
    dtype = torch.bfloat16
    for name, phase, op in ((name, phase, op) for op in ops for name in models for phase in phases):
        model = MODELS[name]
        for m, n, k in shapes(op, model, phase):
            solved = problems(op, m, n, k, device, dtype, model.heads // model.kv_heads)
            yield from _rows(solved, (name, phase, m, n, k), device, rounds, found)


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """The rows as a table, with what was measured where."""
    lines = [f"# Kernels on {about['device']}", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [
        "| op | model | phase | M | N | K | path | us [quartiles] | speed | floor us | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.median_us is None:
            time, speed = f"did not run: {row.note}", ""
        else:
            time, speed = f"{row.median_us:.1f} [{row.low_us:.1f}, {row.high_us:.1f}]", "" if row.speed is None else f"{row.speed:.2f}x"
        floor = "" if row.floor_us is None else f"{row.floor_us:.1f}"
        share = "" if row.share is None else f"{row.share:.0%}"
        lines.append(
            f"| {row.op} | {row.model} | {row.phase} | {row.m} | {row.n} | {row.k} | {row.path} | {time} | {speed} | {floor} | {share} |"
        )
    return "\n".join(lines) + "\n"


def _rows(solved: list[Problem], about: tuple[str, str, int, int, int], device: torch.device, rounds: int, found: Limits) -> Iterator[Row]:
    calls: dict[str, Callable[[], object]] = {}
    of: dict[str, tuple[Problem, str]] = {}
    failed: dict[str, str] = {}

    def enter(path: str, problem: Problem, kind: str, make: Callable[[], Callable[[], object]]) -> None:
        if path in of:
            return
        of[path] = problem, kind
        try:
            call = make()
            call()
            calls[path] = call
        except Exception as error:
            failed[path] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]

    for problem in solved:
        for path, call in problem.dense.items():
            enter(path, problem, "dense", _given(call))
        enter(f"autoeff {problem.variant}", problem, "autoeff", _given(problem.ours))
        for path, make in problem.others.items():
            enter(path, problem, "other", make)
    times = measure(calls, device, rounds)
    base = next((times[path].median_us for path in of if path in times and of[path][1] == "dense"), None)
    name, phase, m, n, k = about
    for path, (problem, kind) in of.items():
        if path in failed:
            nothing = (None,) * 8
            yield Row(problem.op, problem.variant, name, phase, m, n, k, path, kind, *nothing, failed[path])
            continue
        timing = times[path]
        moved = problem.moved_bytes if kind == "autoeff" else None
        operations = problem.flops if kind == "autoeff" else None
        floor = share = None
        if moved is not None and operations is not None and moved > found.cache_bytes:
            floor = found.floor_us(moved, operations)
            share = floor / timing.median_us
        yield Row(
            problem.op, problem.variant, name, phase, m, n, k, path, kind, timing.median_us, timing.low_us, timing.high_us,
            None if base is None else base / timing.median_us, moved, operations, floor, share, timing.method,
        )  # fmt: skip


def _given(call: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    return lambda: call


def _chosen(text: str, allowed: list[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"no {name!r}; allowed: {', '.join(allowed)}")
    return names


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops, phases = list(OPS), ["decode", "prefill"]
    parser = argparse.ArgumentParser(prog="python -m autoeff.kernels.bench", description="Times the kernels of autoeff on this device.")
    parser.add_argument("--ops", type=lambda text: _chosen(text, ops), default=ops, help="operations, separated by commas")
    # gigabytes of weights: minutes on a CPU
    models = ["demo"] if device.type == "cpu" else list(MODELS)
    parser.add_argument("--models", type=lambda text: _chosen(text, list(MODELS)), default=models, help="whose shapes; on a CPU: demo")
    parser.add_argument("--phases", type=lambda text: _chosen(text, phases), default=phases, help="decode, prefill or both")
    parser.add_argument("--rounds", type=int, default=30, help="alternating rounds of a shape, at least 2")
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2: got {options.rounds}")
    found = limits(device, torch.bfloat16)
    gpu = device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "paths": "Triton kernels" if gpu else "CPU paths, not those of a GPU",
        "measured limits": f"{found.bytes_per_s / 1e9:.1f} GB/s, {found.flops_per_s / 1e12:.3f} TFLOP/s in bfloat16",
        "dtype": "bfloat16 activations",
        "date": datetime.date.today().isoformat(),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
    rows: list[Row] = []
    for row in bench(options.ops, options.models, options.phases, device, options.rounds, found):
        rows.append(row)
        print(f"{row.op} {row.model} {row.phase} {row.m}x{row.n}x{row.k} {row.path}", file=sys.stderr, flush=True)  # noqa: T201
    text = markdown(rows, about)
    print(text, end="")  # noqa: T201
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"format": 1, **about, "limits": asdict(found), "rows": [asdict(row) for row in rows]}
        (options.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.out / "kernels.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
