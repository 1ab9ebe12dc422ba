"""One search over `bits,width,skip` against one over `bits` alone, and `autoeff resolve` against a fresh search, at equal bytes.

    python benchmarks/joint_search.py MODELS_AND_DATA [--models stories260K,demo] [--seeds 0,1,2] [--trials 300]

`MODELS_AND_DATA` holds `models/{stories260K,babyllama-105,minilm-l6}`, `data/tinystories-{train,eval}.txt` and
`data/stsb-{train,dev}.csv`; `demo` is bundled with its text. Every model is searched within 20 % and 30 % of its 16-bit `linear_bytes`, with
either space and the same number of evaluations. Each joint run then answers the other's budget. Prints tables and updates
`benchmarks/results/joint_search.json` after each model and seed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from result_files import add_rows
from rich.console import Console
from rich.table import Table

from autoeff.search.job import JobSpec
from autoeff.search.resolve import resolve
from autoeff.search.run import start
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "joint_search.json"
MODELS = ("stories260K", "babyllama-105", "demo", "minilm-l6")
SHARES = ("0.20x", "0.30x")
ALONE, JOINT = "bits", "bits,width,skip"
SETTINGS: dict[str, dict[str, Any]] = {"bits": {"group_size": 32}, "width": {}, "skip": {}}
console = Console(width=140)


def spec(folder: Path, model: str, knobs: str, share: str, seed: int, trials: int) -> JobSpec:
    if model == "demo":
        data, held_out = {"windows": 16, "length": 128}, {"windows": 32, "length": 128}
    elif model == "minilm-l6":
        data = {"source": str(folder / "data" / "stsb-train.csv"), "windows": 128}
        held_out = {"source": str(folder / "data" / "stsb-dev.csv"), "windows": 256}
    else:
        data = {"source": str(folder / "data" / "tinystories-train.txt"), "windows": 16, "length": 128}
        held_out = {"source": str(folder / "data" / "tinystories-eval.txt"), "windows": 32, "length": 128}
    return JobSpec.parse(
        {
            "model": model if model == "demo" else str(folder / "models" / model),
            "data": data,
            "eval_data": held_out,
            "knobs": {name: SETTINGS[name] for name in knobs.split(",")},
            "objectives": ["quality"],
            "limits": [f"linear_bytes<={share}"],
            "budget": {"trials": trials},
            "seed": seed,
        }
    )


def searched(job: JobSpec, run: Path, settings: Settings) -> dict[str, Any]:
    result = start(job, run, settings, lambda progress: None)
    found = min((row for row in result.summary["rows"] if row["role"] == "found" and row["feasible"]), key=lambda row: row["search"])
    best = min(row["search"] for row in result.summary["rows"] if row["feasible"] and row["search"] is not None)
    return {
        "search": best, "found_search": found["search"], "held_out": found["held_out"], "linear_bytes": found["costs"]["linear_bytes"],
        "seconds": result.summary["seconds"], "evaluations": result.summary["evaluations"],
    }  # fmt: skip


def resolved(run: Path, share: str, settings: Settings) -> dict[str, Any]:
    """Seconds of the command without measuring, in a process of its own; then what its answer measures."""
    limit = f"linear_bytes<={share}"
    command = [sys.executable, "-m", "autoeff.cli", "resolve", str(run), "--limit", limit, "--format", "json"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "AUTOEFF_HOME": str(settings.home)})
    seconds = time.perf_counter() - started
    found = resolve(run, [limit], settings, measure=True)

    def value(row: dict[str, Any]) -> float:
        return float(row["measurements"][found.quality]["value"])

    first = value(found.proposals[0]) if found.proposals else value(found.chosen)
    return {"seconds": seconds, "first_proposal": first, "search": value(found.chosen), "measured": len(found.proposals)}


def compared(folder: Path, model: str, seed: int, trials: int, work: Path) -> dict[str, Any]:
    settings = Settings(home=work / "home")
    runs = {(knobs, share): work / f"{knobs}-{share}" for knobs in (ALONE, JOINT) for share in SHARES}
    found = {key: searched(spec(folder, model, *key, seed, trials), run, settings) for key, run in runs.items()}
    answers = {}
    for share, other in (SHARES, SHARES[::-1]):
        answer = resolved(runs[JOINT, other], share, settings)
        answers[share] = {"from": other, **answer, "ratio_to_fresh": answer["search"] / found[JOINT, share]["search"]}
    row = {
        "model": model, "seed": seed, "trials": trials,
        "searches": [{"knobs": knobs, "share": share, **values} for (knobs, share), values in found.items()],
        "resolve": answers,
    }  # fmt: skip
    for share in SHARES:
        alone, joint, answer = found[ALONE, share], found[JOINT, share], answers[share]
        console.print(
            f"{model} seed {seed} {share}: held out {alone['held_out']:.4g} {ALONE}, {joint['held_out']:.4g} {JOINT}; "
            f"resolve in {answer['seconds']:.1f} s: {answer['ratio_to_fresh']:.3f} of a fresh search"
        )
    return row


def show(rows: list[Mapping[str, Any]]) -> None:
    table = Table(title="means over the seeds; quality of a decoder is KL in nats/token, of an encoder 1 - cosine")
    for column in ("model", "bytes", f"{ALONE}, held out", f"{JOINT}, held out", "change", "resolve / fresh", "seconds of resolve"):
        table.add_column(column, justify="right")
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        for share in SHARES:
            alone, joint = (
                mean(s["held_out"] for row in mine for s in row["searches"] if (s["knobs"], s["share"]) == (knobs, share))
                for knobs in (ALONE, JOINT)
            )
            answers = [row["resolve"][share] for row in mine]
            worst, slowest = max(a["ratio_to_fresh"] for a in answers), max(a["seconds"] for a in answers)
            table.add_row(
                model, share, f"{alone:.4g}", f"{joint:.4g}", f"{joint / alone - 1:+.0%}", f"at most {worst:.3f}", f"at most {slowest:.1f}"
            )
    console.print(table)


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    models: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(MODELS),
    seeds: Annotated[str, typer.Option()] = "0,1,2",
    trials: Annotated[int, typer.Option(help="Of every search, in full-token equivalents.")] = 300,
) -> None:
    kept: list[Mapping[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        for model in models.split(","):
            with tempfile.TemporaryDirectory() as work:
                row = compared(folder, model, seed, trials, Path(work))
            kept = add_rows(RESULTS, [row], lambda r: (MODELS.index(r["model"]), r["seed"]), {})
    show(kept)


if __name__ == "__main__":
    typer.run(main)
