"""Found configurations against uniform, the first additive optimum and the best of k random, at equal bytes, held out.

    python benchmarks/search_quality.py MODELS_AND_DATA [--seeds 0,1,2] [--only stories260K]

`MODELS_AND_DATA` holds `models/stories260K`, `models/babyllama-105` and `data/tinystories-{train,eval}.txt`. Every row is one search
of 500 full-token equivalents, damage table and guests included. Prints tables and writes `benchmarks/results/search_quality.json`.
"""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import optuna
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from autoeff.search.job import JobSpec
from autoeff.search.run import plan, start
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "search_quality.json"
MODELS = ("stories260K", "babyllama-105")
TRIALS = 500
BUDGETS = (("bits", 3), ("bits,skip", 2))  # knobs, and the uniform width whose bytes are the limit
SHARES = {"0.25x": 0.56, "0.30x": 0.159, "0.40x": 0.0223}  # of fp16 linear_bytes on stories260K, and the KL to stay below
ROLES = ("uniform", "additive", "random", "found")
console = Console(width=140)


def spec(folder: Path, model: str, knobs: str, seed: int, limit: str, data: dict[str, Any]) -> JobSpec:
    settings = {"bits": {"group_size": 32, "symmetric": False}, "skip": {}}
    return JobSpec.parse(
        {
            "model": str(folder / "models" / model),
            "data": {"source": str(folder / "data" / "tinystories-train.txt"), **data},
            "eval_data": {"source": str(folder / "data" / "tinystories-eval.txt"), "windows": 64, "length": 128},
            "knobs": {name: settings[name] for name in knobs.split(",")},
            "space": {"untie": True},
            "objectives": ["kl"],
            "limits": [limit],
            "budget": {"trials": TRIALS},
            "seed": seed,
        }
    )


def search(job: JobSpec, work: Path, name: str) -> dict[str, Any]:
    result = start(job, work / name, Settings.read(), lambda progress: None)
    rows = result.summary["rows"]
    limit = job.limits[0]

    def best(role: str) -> dict[str, Any]:
        """The best feasible row of a role; guests compete only where they keep the limit."""
        mine = [row for row in rows if row["role"] == role and row["feasible"]]
        row = min(mine, key=lambda row: row["search"])
        return {"search": row["search"], "held_out": row["held_out"], "linear_bytes": row["costs"]["linear_bytes"], "label": row["label"]}

    roles = {role: best(role) for role in ROLES}
    return {"limit": limit, "seed": job.seed, **roles, "seconds": result.summary["seconds"], "evaluations": result.summary["evaluations"]}


def equal_bytes(folder: Path, model: str, knobs: str, width: int, seeds: list[int], work: Path) -> list[dict[str, Any]]:
    data = {"windows": 32, "length": 128}
    rows = []
    for seed in seeds:
        probe = spec(folder, model, knobs, seed, "linear_bytes<=1.0x", data)
        space = plan(probe, Settings.read()).space
        uniform = space.uniform[f"bits={width}"]
        limit = f"linear_bytes<={space.primary(space.indices(uniform.levels))['linear_bytes']}"
        rows.append(
            {
                "model": model,
                "knobs": knobs,
                "width": width,
                **search(spec(folder, model, knobs, seed, limit, data), work, f"{model}-{knobs}-{seed}"),
            }
        )
        console.print(f"{model} {knobs} seed {seed}: found {rows[-1]['found']['held_out']:.4f} held out in {rows[-1]['seconds']:.0f} s")
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    shown = Table(title=f"KL in nats/token at equal linear_bytes, {TRIALS} evaluations each")
    for column in (
        "model",
        "knobs",
        "bytes of",
        "seed",
        "uniform",
        "additive",
        "random",
        "found",
        "held-out: uniform",
        "additive",
        "random",
        "found",
    ):
        shown.add_column(column)
    for row in rows:
        values = [f"{row[role][split]:.4f}" for split in ("search", "held_out") for role in ROLES]
        shown.add_row(row["model"], row["knobs"], f"{row['width']} bit", str(row["seed"]), *values)
    console.print(shown)


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    seeds: Annotated[str, typer.Option()] = "0,1,2",
    only: Annotated[str | None, typer.Option(help="One model.")] = None,
) -> None:
    chosen = [int(seed) for seed in seeds.split(",")]
    models = [model for model in MODELS if only in (None, model)]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows = [row for model in models for knobs, width in BUDGETS for row in equal_bytes(folder, model, knobs, width, chosen, work)]
        shares = []
        if "stories260K" in models:
            data = {"windows": 16, "length": 128, "draw": "first"}
            for share, bound in SHARES.items():
                row = search(spec(folder, "stories260K", "bits", 0, f"linear_bytes<={share}", data), work, f"share-{share}")
                shares.append({"share": share, "bound": bound, **row})
                console.print(f"stories260K at {share}: KL {row['found']['search']:.4f} (at most {bound})")
    table(rows)
    means = {}
    for model in models:
        for knobs, _ in BUDGETS:
            mine = [row for row in rows if (row["model"], row["knobs"]) == (model, knobs)]
            means[f"{model} {knobs}"] = {role: mean(row[role]["held_out"] for row in mine) for role in ROLES}
            console.print(f"mean held-out KL, {model} {knobs}: " + ", ".join(f"{k} {v:.4f}" for k, v in means[f"{model} {knobs}"].items()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "date": datetime.date.today().isoformat(),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "versions": {m.__name__: m.__version__ for m in (torch, transformers, optuna)},
                "rows": rows,
                "means": means,
                "shares": shares,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
