"""CPU: the packed low-bit linear beside the dense one, timed at the operation with bfloat16 activations.

    python benchmarks/kernel_linear_wq.py [--rounds 60] [--threads 1,2]

All contestants of a shape alternate within a round, the first in turn; a time is the median over rounds of the mean of a few calls, with the
quartiles as spread; the ratio is taken round by round against dense fp32. Each thread count runs in a process of its own. Dense fp32 gets
float32 activations (nothing is converted inside its time), everything else bfloat16. Writes `benchmarks/results/kernel_linear_wq_cpu.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.nn.functional import linear as dense_linear

from autoeff.kernels import dequantize_wq
from autoeff.kernels.linear_wq import CpuWeight, Weight, linear, moved_bytes

RESULTS = Path(__file__).parent / "results" / "kernel_linear_wq_cpu.json"
SHAPES = {"demo q": (192, 192), "demo gate": (448, 192), "demo down": (192, 448), "4096 x 4096": (4096, 4096)}
GROUP = 64
AIMED_S = 2e-3
"""Calls of one timing are repeated up to about this time: a single small product is shorter than the clock is exact."""


def contestants(n: int, k: int, m: int) -> dict[str, Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    dense, half = torch.randn(n, k, generator=generator), x.bfloat16()
    dense_half = dense.bfloat16()
    found: dict[str, Callable[[], torch.Tensor]] = {
        "dense fp32": lambda: dense_linear(x, dense),
        "dense bf16": lambda: dense_linear(half, dense_half),
    }
    for bits in dequantize_wq.PLANES:
        codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(n, k // GROUP, generator=generator) * 0.1).half()
        packed = CpuWeight(Weight(dequantize_wq.pack(codes, bits), scale, -scale, bits, k, GROUP))
        found[f"{bits} bit"] = lambda packed=packed: linear(half, packed)  # type: ignore[misc]
    return found


def timings(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for (name, (n, k)), m in ((shape, m) for shape in SHAPES.items() for m in (1, 4)):
        runs = contestants(n, k, m)
        calls = {}
        for label, run in runs.items():
            run()
            started = time.perf_counter()
            run()
            calls[label] = max(1, min(200, round(AIMED_S / (time.perf_counter() - started))))
        times: dict[str, list[float]] = {label: [] for label in runs}
        order = list(runs)
        for number in range(rounds):
            first = number % len(order)
            for label in order[first:] + order[:first]:
                started = time.perf_counter()
                for _ in range(calls[label]):
                    runs[label]()
                times[label].append((time.perf_counter() - started) / calls[label])
        for label, values in times.items():
            low, _, high = quantiles(values, n=4)
            speed = [dense / value for dense, value in zip(times["dense fp32"], values, strict=True)]
            slow, _, fast = quantiles(speed, n=4)
            rows.append({
                "shape": name, "m": m, "n": n, "k": k, "path": label, "median_us": median(values) * 1e6, "quartiles_us": [low * 1e6, high * 1e6],
                "speed_vs_dense_fp32": median(speed), "speed_quartiles": [slow, fast],
                "bytes": moved_bytes(m, n, k, int(label[0]), GROUP, False) if label.endswith("bit") else None,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="alternating rounds of a shape, at least 2")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)  # the process of one thread count
    options = parser.parse_args()
    if options.inside:
        torch.set_num_threads(options.inside)
        print(json.dumps(timings(options.rounds)))
        return
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__}, "group": GROUP, "activations": "bfloat16 (dense fp32: float32)", "rounds": options.rounds,
        "load_before": os.getloadavg()[0], "threads": {},
    }  # fmt: skip
    for threads in options.threads.split(","):
        command = [sys.executable, __file__, "--rounds", str(options.rounds), "--inside", threads]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        rows = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
        result["threads"][threads] = rows
        print(f"{threads} thread(s); microseconds as median [quartiles], speed against dense fp32 round by round")
        for row in rows:
            low, high = row["quartiles_us"]
            slow, fast = row["speed_quartiles"]
            print(
                f"  {row['shape']:12s} M {row['m']}  {row['path']:10s} {row['median_us']:9.1f} [{low:.1f}, {high:.1f}]"
                f"  {row['speed_vs_dense_fp32']:5.2f}x [{slow:.2f}, {fast:.2f}]"
            )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
