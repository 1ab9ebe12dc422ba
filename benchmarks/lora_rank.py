"""Ranks of adapters: do prefixes of one adapter rank like adapters trained from scratch, and are searched ranks better than others?

    python benchmarks/lora_rank.py MODELS_AND_DATA [--seeds 0,1,2] [--tokens 100000] [--vectors 20] [--trials 120]

`MODELS_AND_DATA` holds `models/babyllama-105` and `data/tinyshakespeare.txt`, to which the model is tuned: three fifths are trained on, the
fourth is searched on, the last is held out. First part, seed 0: random rank vectors, what the super-adapter says of each, and the loss of
adapters trained from scratch at these ranks. Second part: at a quarter of the parameters of rank 16 everywhere, ranks that are searched,
that EVA gives and that are uniform, each trained from scratch with the same order of the data; AdaLoRA is not among them. Writes
`benchmarks/results/lora_rank.json`.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from result_files import add_rows
from rich.console import Console

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.quality import spearman
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "lora_rank.json"
LENGTH, WINDOWS, HELD_OUT = 128, 32, 200
LIMIT = "trainable_parameters<=0.25x"
console = Console(width=140)


def job(folder: Path, seed: int, tokens: int, trials: int) -> JobSpec:
    text = str(folder / "data" / "tinyshakespeare.txt")
    return JobSpec.parse(
        {
            "model": str(folder / "models" / "babyllama-105"),
            "tune_data": {"source": text, "length": LENGTH},
            "data": {"source": text, "length": LENGTH, "windows": WINDOWS},
            "eval_data": {"length": LENGTH, "windows": HELD_OUT},
            "knobs": {"lora_rank": {"tokens": tokens}},
            "objectives": ["quality"],
            "limits": [LIMIT],
            "budget": {"trials": trials},
            "seed": seed,
        }
    )


def measured(evaluator: Evaluator, levels: dict[str, Any]) -> dict[str, float]:
    """What the super-adapter says of a rank vector, on search and held-out text, and what training from scratch gives."""
    found = {m.name: m.value for m in evaluator.evaluate(EvaluationRequest(levels, "search", WINDOWS))}
    found |= {m.name: m.value for m in evaluator.evaluate(EvaluationRequest(levels, "held_out", HELD_OUT))}
    scratch = {m.name: m.value for m in evaluator.trained(levels)}
    return {"kl": found["kl"], "loss_super": found["loss_held_out"], "loss_scratch": scratch["loss_held_out"]}


def vectors(evaluator: Evaluator, count: int) -> list[dict[str, Any]]:
    """Random ones, of few parameters and of many."""
    rows = []
    for number in range(count):
        rng = random.Random(number)
        odds = [rng.random() for _ in range(5)]
        space = evaluator.space
        indices = [rng.choices(range(len(d.levels)), odds)[0] for d in space.decisions]
        started = time.perf_counter()
        row: dict[str, Any] = {
            "part": "vectors",
            "seed": 0,
            "method": f"random {number:02}",
            **measured(evaluator, dict(space.at(indices).levels)),
        }
        row["trainable_parameters"] = space.primary(indices)["trainable_parameters"]
        rows.append(row | {"seconds": round(time.perf_counter() - started, 1)})
        console.print(row)
    return rows


def methods(spec: JobSpec, home: Path) -> list[dict[str, Any]]:
    settings = Settings(home=home)
    result = start(spec, home / f"run-{spec.seed}", settings)
    assert result.found is not None
    names = {"eva": "eva", "lora_rank=4": "uniform"}
    chosen = {"searched": result.found} | {names[row["label"]]: row for row in result.rows if row.get("label") in names}
    evaluator = Evaluator(spec.setup(settings.bank))
    rows = []
    for method, row in chosen.items():
        values = measured(evaluator, dict(row["configuration"]))
        count = row["measurements"]["trainable_parameters"]["value"]
        rows.append({"part": "methods", "seed": spec.seed, "method": method, **values, "trainable_parameters": count})
        console.print(rows[-1])
    return rows


def said(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations over the vectors, and losses over the seeds."""
    found: dict[str, Any] = {}
    vectors = [row for row in rows if row["part"] == "vectors"]
    if len(vectors) > 2:
        scratch = torch.tensor([row["loss_scratch"] for row in vectors])
        for name in ("kl", "loss_super", "trainable_parameters"):
            score = torch.tensor([row[name] for row in vectors], dtype=torch.float64)
            found[f"spearman_{name}"] = round(spearman(-score if name == "trainable_parameters" else score, scratch), 3)
    for method in ("searched", "eva", "uniform"):
        losses = [row["loss_scratch"] for row in rows if row["part"] == "methods" and row["method"] == method]
        if losses:
            found[method] = {"loss_scratch": round(mean(losses), 4), "spread": round(stdev(losses), 4) if len(losses) > 1 else None}
    return found


def main(
    folder: Path,
    seeds: str = "0,1,2",
    tokens: Annotated[int, typer.Option(help="Of every training.")] = 100_000,
    vectors_: Annotated[int, typer.Option("--vectors", help="Random rank vectors.")] = 20,
    trials: Annotated[int, typer.Option(help="Of every search.")] = 120,
) -> None:
    """Measures, writes and prints."""
    with tempfile.TemporaryDirectory() as home:
        rows: list[dict[str, Any]] = []
        for seed in map(int, filter(None, seeds.split(","))):
            rows += methods(job(folder, seed, tokens, trials), Path(home))
        if vectors_:
            rows += vectors(Evaluator(job(folder, 0, tokens, trials).setup(Settings(home=Path(home)).bank)), vectors_)
    settings = {"tokens": tokens, "length": LENGTH, "limit": LIMIT, "model": "babyllama-105", "text": "tinyshakespeare"}
    kept = add_rows(RESULTS, rows, lambda row: (row["part"], row["seed"], row["method"]), settings, said)
    console.print(said(kept))


if __name__ == "__main__":
    typer.run(main)
