"""One search over weights and cache together against two searches in turn, at equal bytes read per token and equal evaluations.

    python benchmarks/joint_vs_sequential.py MODELS_AND_DATA [--models demo,babyllama-105] [--seeds 0,1,2] [--ratios 0.5,1,2] [--trials 80]

`MODELS_AND_DATA` holds `models/babyllama-105` and `data/tinystories-{train,eval}.txt`; `demo` is bundled. The batch is chosen so that the dense
cache's bytes are `ratio` times the dense weights'. All keep `bytes_per_token <= 0.3x`. Joint: `bits,kv_budget`, N evaluations. In turn: N/2
evaluations over one knob within 0.3x of its own bytes, then N/2 over the other, with the first held to what was found (or undone, where the
second search prefers that), within the whole limit; both orders, of which the better by held-out text counts as the pipeline. The value is the
KL to the full cache on the second half of held-out windows. Updates `benchmarks/results/joint_vs_sequential.json` after each row.
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

RESULTS = Path(__file__).parent / "results" / "joint_vs_sequential.json"
SHARE, CONTEXT = 0.3, 256
OWN_BYTES = {"bits": "linear_bytes", "kv_budget": "kv_bytes"}
METHODS = ("joint", "bits then kv_budget", "kv_budget then bits")
console = Console(width=140)


def spec(folder: Path, model: str, knobs: list[str], limit: str, batch: int, seed: int, trials: int, held: Mapping[str, Any]) -> JobSpec:
    text: dict[str, Any] = {"windows": 16, "length": CONTEXT}
    judged: dict[str, Any] = {"windows": 32, "length": CONTEXT}
    if model != "demo":
        text |= {"source": str(folder / "data" / "tinystories-train.txt"), "bos": "per_document"}
        judged |= {"source": str(folder / "data" / "tinystories-eval.txt"), "bos": "per_document"}
    settings: dict[str, dict[str, Any]] = {"bits": {"group_size": 32}, "kv_budget": {}}
    return JobSpec.parse(
        {
            "model": model if model == "demo" else str(folder / "models" / model),
            "data": text,
            "eval_data": judged,
            "knobs": {name: settings[name] for name in knobs},
            "space": {"levels": {key: [level] for key, level in held.items()}},
            "objectives": ["kl"],
            "limits": [limit],
            "budget": {"trials": trials},
            "batch": batch,
            "context": CONTEXT,
            "seeds": "none",
            "seed": seed,
        }
    )


def batch_for(folder: Path, model: str, ratio: float, settings: Settings) -> int:
    """Sequences at which the dense cache takes `ratio` times the bytes of the dense weights."""
    known = plan(spec(folder, model, ["bits", "kv_budget"], f"bytes_per_token<={SHARE}x", 1, 0, 10_000, {}), settings).problem.cost_model
    return max(1, round(ratio * float(known.dense("linear_bytes") / known.dense("kv_bytes"))))


def found(result: Result) -> dict[str, Any]:
    row = min((r for r in result.summary["rows"] if r["role"] == "found"), key=lambda r: r["search"])
    return {"search": row["search"], "held_out": row["held_out"], "bytes_per_token": row["costs"]["bytes_per_token"], "trial": row["trial"]}


def in_turn(
    folder: Path, model: str, order: list[str], batch: int, seed: int, trials: int, work: Path, settings: Settings
) -> dict[str, Any]:
    first = order[0]
    alone = start(
        spec(folder, model, [first], f"{OWN_BYTES[first]}<={SHARE}x", batch, seed, trials // 2, {}), work / f"{first} alone", settings
    )
    held = next(row["configuration"] for row in alone.rows if row["trial"] == alone.summary["found"])
    whole = spec(folder, model, order, f"bytes_per_token<={SHARE}x", batch, seed, trials - trials // 2, held)
    return found(start(whole, work / f"{first} first", settings))


def compared(folder: Path, model: str, ratio: float, seed: int, trials: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        settings = Settings(home=work / "home")
        batch = batch_for(folder, model, ratio, settings)
        knobs = list(OWN_BYTES)
        joint = start(spec(folder, model, knobs, f"bytes_per_token<={SHARE}x", batch, seed, trials, {}), work / "joint", settings)
        values = {METHODS[0]: found(joint)}
        for method, order in zip(METHODS[1:], (knobs, knobs[::-1]), strict=True):
            values[method] = in_turn(folder, model, order, batch, seed, trials, work, settings)
    return {"model": model, "ratio": ratio, "seed": seed, "batch": batch, "values": values, "attribution": joint.summary["attribution"]}


def means_of(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By model and ratio: held-out KL of each method, and the change from the better order to the joint search, over the seeds."""
    means = []
    for model, ratio in dict.fromkeys((row["model"], row["ratio"]) for row in rows):
        mine = [row["values"] for row in rows if (row["model"], row["ratio"]) == (model, ratio)]
        changes = [v["joint"]["held_out"] / min(v[m]["held_out"] for m in METHODS[1:]) - 1 for v in mine]
        means.append(
            {
                "model": model,
                "ratio": ratio,
                "seeds": len(mine),
                "held_out": {method: mean(v[method]["held_out"] for v in mine) for method in METHODS},
                "change": mean(changes),
                "spread": stdev(changes) if len(changes) > 1 else None,
            }
        )
    return means


def show(means: list[dict[str, Any]]) -> None:
    table = Table(title="KL to the full cache in nats/token, held out, means over the seeds")
    for column in ("model", "cache / weights", *METHODS, "joint against the better order"):
        table.add_column(column, justify="right")
    for row in means:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.0%}"
        cells = [f"{row['held_out'][method]:.4g}" for method in METHODS]
        table.add_row(row["model"], f"{row['ratio']:g}", *cells, f"{row['change']:+.0%}{spread} ({row['seeds']} seeds)")
    console.print(table)


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    models: Annotated[str, typer.Option(help="Separated by commas.")] = "demo,babyllama-105",
    seeds: Annotated[str, typer.Option()] = "0,1,2",
    ratios: Annotated[str, typer.Option(help="Bytes of the dense cache for each byte of the dense weights.")] = "0.5,1,2",
    trials: Annotated[int, typer.Option(help="Of the joint search, and of both searches of a pipeline together.")] = 80,
) -> None:
    kept: list[Mapping[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        for model in models.split(","):
            for ratio in map(float, ratios.split(",")):
                row = compared(folder, model, ratio, seed, trials)
                settings = {"share": SHARE, "context": CONTEXT, "trials": trials}
                kept = add_rows(RESULTS, [row], lambda r: (r["model"], r["ratio"], r["seed"]), settings, means_of)
                console.print(model, ratio, seed, {method: round(value["held_out"], 4) for method, value in row["values"].items()})
    show(means_of(kept))


if __name__ == "__main__":
    typer.run(main)
