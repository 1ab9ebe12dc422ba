"""Draws what `python -m autoeff.kernels.bench --out DIR` measured: operations per second over operations per byte, under the device's limits.

python benchmarks/kernel_roofline.py DIR/kernels.json DIR/roofline.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="kernels.json")
    parser.add_argument("picture", type=Path, help="where the picture goes")
    options = parser.parse_args()
    found = json.loads(options.results.read_text(encoding="utf-8"))
    ours = [row for row in found["rows"] if row["kind"] == "autoeff" and row["median_us"]]
    limits = found["limits"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for op in sorted({row["op"] for row in ours}):
        rows = [row for row in ours if row["op"] == op]
        axes.scatter(
            [row["flops"] / row["moved_bytes"] for row in rows], [row["flops"] / row["median_us"] / 1e3 for row in rows], s=18, label=op
        )
    intensity = [2.0**power for power in range(-4, 14)]
    roof = [min(x * limits["bytes_per_s"], limits["flops_per_s"]) / 1e9 for x in intensity]
    axes.plot(intensity, roof, color="black", label="measured limits")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title=f"{found['device']}: {found['paths']}")
    axes.legend(fontsize=7)
    figure.savefig(options.picture, dpi=150)


if __name__ == "__main__":
    main()
