"""Searched budgets of a key/value cache against uniform ones and three published rules, at equal bytes, held out.

    python benchmarks/kv_front.py MODELS_AND_DATA [--seeds 0,1,2] [--trials 100] [--policy snapkv] [--only demo]

`MODELS_AND_DATA` holds `models/babyllama-105` and `data/tinystories-{train,eval}.txt`; `demo` is bundled. Every row is one search over 16
windows of 256 tokens, the second half of each generated after the first; the value is the KL to the full cache on that half. What the
search proposes is chosen by the search text, and all are judged on 32 windows of other text. Stories are read as documents, each behind a
BOS, as the model was trained: with the dividing lines read as text, what is lost hangs on the few windows that hold one. Writes `benchmarks/results/kv_front.json`, where rows of other
models and seeds stay.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from result_files import add_rows
from rich.console import Console
from rich.table import Table

from autoeff.search.job import JobSpec
from autoeff.search.run import Result, start
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "kv_front.json"
MODELS = ("demo", "babyllama-105")
SHARES = (0.125, 0.25)
CONTEXT, WINDOWS, HELD_OUT = 256, 16, 32
RULES = ("pyramidkv", "prefixkv", "cake")
METHODS = ("uniform", *RULES, "searched")
console = Console(width=140)


def spec(folder: Path, model: str, share: float, seed: int, trials: int, policy: str) -> JobSpec:
    text: dict[str, Any] = {"windows": WINDOWS, "length": CONTEXT}
    judged: dict[str, Any] = {"windows": HELD_OUT, "length": CONTEXT}
    if model != "demo":
        text |= {"source": str(folder / "data" / "tinystories-train.txt"), "bos": "per_document"}
        judged |= {"source": str(folder / "data" / "tinystories-eval.txt"), "bos": "per_document"}
    return JobSpec.parse(
        {
            "model": model if model == "demo" else str(folder / "models" / model),
            "data": text,
            "eval_data": judged,
            "knobs": {"kv_budget": {"policy": policy}},
            "objectives": ["kl"],
            "limits": [f"kv_bytes<={share}x"],
            "budget": {"trials": trials},
            "context": CONTEXT,
            "seed": seed,
        }
    )


def values(result: Result, share: float) -> dict[str, dict[str, float]]:
    """By method the KL on both texts and the bytes; of what was searched, the one that is best on the search text."""
    rows = {"uniform": ["uniform", f"kv_budget={share}"], **{rule: ["seed", rule] for rule in RULES}}
    most = share * next(row["measurements"]["kv_bytes"]["value"] for row in result.rows if row["origin"] == "dense")
    both = [row for row in result.rows if {"kl", "kl_held_out"} <= row["measurements"].keys()]
    tried = [row for row in both if row["measurements"]["kv_bytes"]["value"] <= most]
    found = {method: [row for row in tried if [row["origin"], row.get("label")] == wanted] for method, wanted in rows.items()}
    found["searched"] = [row for row in tried if row["origin"] in ("searched", "additive")]
    best = {method: min(mine, key=lambda row: row["measurements"]["kl"]["value"]) for method, mine in found.items() if mine}
    return {
        method: {
            name: row["measurements"][key]["value"] for name, key in (("search", "kl"), ("held_out", "kl_held_out"), ("bytes", "kv_bytes"))
        }
        for method, row in best.items()
    }


def means_of(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By model and budget the held-out KL of each method: mean and deviation over the seeds, and how often what was searched is better."""
    found = []
    for model, share in dict.fromkeys((row["model"], row["share"]) for row in rows):
        mine = [row["kl"] for row in rows if (row["model"], row["share"]) == (model, share)]
        kl = {method: [by[method]["held_out"] for by in mine if method in by] for method in METHODS}
        found.append(
            {
                "model": model,
                "share": share,
                "seeds": len(mine),
                "mean": {method: mean(items) for method, items in kl.items() if items},
                "deviation": {method: stdev(items) if len(items) > 1 else None for method, items in kl.items() if items},
                "beaten": {
                    method: sum(by["searched"]["held_out"] < by[method]["held_out"] for by in mine if method in by)
                    for method in METHODS[:-1]
                },
            }
        )
    return found


def table(means: list[dict[str, Any]], policy: str, trials: int) -> Table:
    shown = Table(title=f"KL to the full cache in nats/token, held out, {policy}, {trials} evaluations; mean ± deviation over seeds")
    for column in ("model", "mean budget", *METHODS):
        shown.add_column(column)
    for row in means:
        cells = {m: f"{v:.4f}" + ("" if row["deviation"][m] is None else f" ± {row['deviation'][m]:.4f}") for m, v in row["mean"].items()}
        shown.add_row(row["model"], f"{row['share']:.1%}", *(cells.get(method, "") for method in METHODS))
    return shown


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    seeds: Annotated[str, typer.Option()] = "0,1,2",
    trials: Annotated[int, typer.Option(help="Budget of a search in full-token equivalents, guests included.")] = 100,
    policy: Annotated[str, typer.Option()] = "snapkv",
    only: Annotated[str | None, typer.Option(help="One model.")] = None,
) -> None:
    rows: list[Mapping[str, Any]] = []
    chosen = [model for model in MODELS if only in (None, model)]
    with tempfile.TemporaryDirectory() as work:
        for seed, model, share in product(map(int, seeds.split(",")), chosen, SHARES):
            job = spec(folder, model, share, seed, trials, policy)
            result = start(job, Path(work) / f"{model}-{seed}-{share}", Settings.read())
            by_method = values(result, share)
            row = {"model": model, "share": share, "seed": seed, "seconds": result.summary["seconds"], "kl": by_method}
            told = ", ".join(f"{method} {by_method[method]['held_out']:.4f}" for method in METHODS if method in by_method)
            console.print(f"{model} at {share:.1%}, seed {seed}: {told}; {row['seconds']:.0f} s")
            settings = {"policy": policy, "trials": trials, "context": CONTEXT, "windows": WINDOWS}
            rows = add_rows(RESULTS, [row], lambda r: (r["model"], r["share"], r["seed"]), settings, means_of)
    console.print(table(means_of(rows), policy, trials))


if __name__ == "__main__":
    typer.run(main)
