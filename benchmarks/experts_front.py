"""Experts chosen layer by layer against the same number everywhere, on the bundled mixture of experts.

    python benchmarks/experts_front.py [--seeds 0,1,2] [--trials 120]

Kept: one search of `experts_kept` at the bytes of each uniform level (6, 4 and 2 of 8 experts stored). Active: searches of `experts` with
half of what all layers could spare of `flops_per_token`; `demo-moe` sends a token to two experts, so the only uniform levels are two and
one, and layers that send to one are chosen against the mean of random choices of equal arithmetic. Values are KL to the dense model in
nats/token. Updates `benchmarks/results/experts_front.json` after each seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from result_files import add_rows
from rich.console import Console
from rich.table import Table

from autoeff.search.job import JobSpec
from autoeff.search.run import Result, plan, start
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "experts_front.json"
MODEL = "demo-moe"
console = Console(width=120)


def spec(knob: str, objectives: list[str], limits: list[str], seed: int, trials: int) -> JobSpec:
    data, held_out = ({"windows": windows, "length": 128} for windows in (16, 32))
    return JobSpec.parse(
        {
            "model": MODEL, "data": data, "eval_data": held_out, "knobs": {knob: {}}, "objectives": objectives, "limits": limits,
            "budget": {"trials": trials}, "seed": seed,
        }
    )  # fmt: skip


def kept(result: Result) -> list[dict[str, Any]]:
    """By uniform level: it, and what was found at its bytes, both on held-out text."""
    rows = result.summary["rows"]
    uniform = {row["label"]: row for row in rows if row["role"] == "uniform"}
    return [
        {
            "point": row["point"],
            "uniform": uniform[row["point"]]["held_out"],
            "found": row["held_out"],
            "bytes": [uniform[row["point"]]["costs"]["linear_bytes"], row["costs"]["linear_bytes"]],
        }
        for row in rows
        if row["role"] == "found"
    ]


def active(result: Result) -> dict[str, Any]:
    """What was found, and the mean and the best of random choices, all on the search text."""
    values = [row["measurements"]["kl"]["value"] for row in result.rows if row["origin"] == "random" and "kl" in row["measurements"]]
    found = next(row for row in result.summary["rows"] if row["role"] == "found")
    return {"random": mean(values), "best_random": min(values), "found": found["search"], "found_held_out": found["held_out"]}


def compared(seed: int, trials: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        work, settings = Path(name), Settings(home=Path(name) / "home")
        stored = start(spec("experts_kept", ["quality", "linear_bytes"], [], seed, trials), work / "kept", settings)
        known = plan(spec("experts", ["quality"], [], seed, trials), settings)
        middle = (known.dense["flops_per_token"] + known.least["flops_per_token"]) / 2
        limits = [f"flops_per_token<={middle:.0f}"]
        sent = start(spec("experts", ["quality"], limits, seed, trials), work / "active", settings)
        return {"seed": seed, "kept": kept(stored), "active": active(sent)}


def show(rows: list[Mapping[str, Any]]) -> None:
    table = Table(title="KL in nats/token, mean over the seeds")
    for column in ("experts", "same everywhere", "layer by layer", "change"):
        table.add_column(column, justify="right")
    for point in [found["point"] for found in rows[0]["kept"]]:
        pairs = [(found["uniform"], found["found"]) for row in rows for found in row["kept"] if found["point"] == point]
        table.add_row(point, *_cells(pairs))
    table.add_row("half sent to one", *_cells([(row["active"]["random"], row["active"]["found"]) for row in rows]))
    console.print(table)


def _cells(pairs: list[tuple[float, float]]) -> list[str]:
    changes = [b / a - 1 for a, b in pairs]
    spread = f" ± {stdev(changes):.0%}" if len(changes) > 1 else ""
    return [f"{mean(a for a, _ in pairs):.4g}", f"{mean(b for _, b in pairs):.4g}", f"{mean(changes):+.0%}{spread}"]


def main(
    seeds: Annotated[str, typer.Option()] = "0,1,2",
    trials: Annotated[int, typer.Option(help="Of every search, in full-token equivalents.")] = 120,
) -> None:
    rows: list[Mapping[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        rows = add_rows(RESULTS, [compared(seed, trials)], lambda row: (row["seed"],), {"model": MODEL, "trials": trials})
    show(rows)


if __name__ == "__main__":
    typer.run(main)
