"""The picture of what `kernels bench` measured: operations per second over operations per byte, under the device's limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw_roofline"]


def draw_roofline(found: Mapping[str, Any]) -> Figure:
    """One point for every problem that a kernel of ours solved, and the roof above them.

    Args:
        found: What `kernels.json` holds.

    Source: the roofline model, Williams et al. 2009, doi:10.1145/1498765.1498785.
    """
    ours = [row for row in found["rows"] if row["kind"] == "autoeff" and row["median_us"]]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for op in sorted({row["op"] for row in ours}):
        rows = [row for row in ours if row["op"] == op]
        intensity = [row["flops"] / row["moved_bytes"] for row in rows]
        axes.scatter(intensity, [row["flops"] / row["median_us"] / 1e3 for row in rows], s=18, label=op)
    bandwidth, rate = found["limits"]["bytes_per_s"], found["limits"]["flops_per_s"]
    roof = [2.0**power for power in range(-4, 14)]
    axes.plot(roof, [min(x * bandwidth, rate) / 1e9 for x in roof], color="black", label="measured limits")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title=f"{found['device']}: {found['paths']}")
    axes.legend(fontsize=7)
    return figure
