"""One search with every knob that applies to a model: that it ends, what it finds beside the baselines, and what each knob earned.

    python benchmarks/every_knob.py MODELS_AND_DATA [--models demo,demo-moe,stories260K,babyllama-105,minilm-l6] [--trials 250]

`MODELS_AND_DATA` holds `models/{stories260K,babyllama-105,minilm-l6}`, `data/tinystories-{train,eval}.txt` and `data/stsb-{train,dev}.csv`; the
others are bundled. Knobs are taken in the order of their kinds; one that finds nothing in the model, or may not be searched together with one
that is taken already, is left out with the reason. Decoders keep `bytes_per_token <= 0.3x` at batch 8 and a context of 256, encoders
`linear_bytes <= 0.2x`. Updates `benchmarks/results/every_knob.json` after each model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from result_files import add_rows
from rich.console import Console
from rich.table import Table

from autoeff.errors import InputError
from autoeff.evaluators.preparation import prepare
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings
from autoeff.spaces.knob import KINDS, known_knobs

RESULTS = Path(__file__).parent / "results" / "every_knob.json"
MODELS = ("demo", "demo-moe", "stories260K", "babyllama-105", "minilm-l6")
ENCODERS = ("minilm-l6",)
BUNDLED = ("demo", "demo-moe")
CONTEXT, BATCH = 256, 8
FIRST = ("bits", "skip")  # where two knobs exclude each other, these are what people use
console = Console(width=140)


def spec(folder: Path, model: str, knobs: list[str], seed: int, trials: int) -> JobSpec:
    fields: dict[str, Any] = {"model": model if model in BUNDLED else str(folder / "models" / model)}
    if model in ENCODERS:
        fields["data"] = {"source": str(folder / "data" / "stsb-train.csv"), "windows": 128}
        fields["eval_data"] = {"source": str(folder / "data" / "stsb-dev.csv"), "windows": 256}
        fields["limits"] = ["linear_bytes<=0.2x"]
    else:
        fields |= {"batch": BATCH, "context": CONTEXT, "limits": ["bytes_per_token<=0.3x"]}
        fields["data"], fields["eval_data"] = ({"windows": windows, "length": CONTEXT} for windows in (16, 32))
        if model not in BUNDLED:
            fields["data"] |= {"source": str(folder / "data" / "tinystories-train.txt"), "bos": "per_document"}
            fields["eval_data"] |= {"source": str(folder / "data" / "tinystories-eval.txt"), "bos": "per_document"}
    settings = {"bits": {"group_size": 32}}
    return JobSpec.parse(
        fields
        | {"knobs": {name: settings.get(name, {}) for name in knobs}, "objectives": ["quality"], "budget": {"trials": trials}, "seed": seed}
    )


def applicable(folder: Path, model: str, settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The knobs that can be searched together, and why others cannot."""
    order = sorted(known_knobs().items(), key=lambda item: (item[0] not in FIRST, KINDS.index(item[1].kind), item[0]))
    taken: list[str] = []
    left_out: dict[str, str] = {}
    for name, _ in order:
        try:
            prepare(spec(folder, model, [*taken, name], 0, 1).setup(settings.bank))
        except InputError as error:
            left_out[name] = str(error)
        else:
            taken.append(name)
    return taken, left_out


def searched(folder: Path, model: str, seed: int, trials: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        settings = Settings(home=Path(work) / "home")
        knobs, left_out = applicable(folder, model, settings)
        result = start(spec(folder, model, knobs, seed, trials), Path(work) / "run", settings)
    rows = [row for row in result.summary["rows"] if row["feasible"] and row["held_out"] is not None]
    best = {
        role: min((r["held_out"] for r in rows if r["role"] == role), default=None)
        for role in ("uniform", "seed", "additive", "random", "found")
    }
    front = [row for row in result.front if f"{result.summary['quality']}_held_out" in row["measurements"]]
    return {
        "model": model,
        "seed": seed,
        "knobs": knobs,
        "left_out": left_out,
        "decisions": len(result.rows[0]["configuration"]),
        "quality": result.summary["quality"],
        "held_out": best,
        "front": len(front),
        "failures": sum("failure" in row for row in result.rows),
        "seconds": round(result.summary["seconds"]),
        "attribution": result.summary["attribution"],
    }


def show(rows: list[Mapping[str, Any]]) -> None:
    table = Table(
        title="held out: KL in nats/token, of an encoder 1 - cosine; earned: what the best replacement by one level everywhere loses"
    )
    for column in ("model", "knobs", "uniform", "additive", "random", "found", "earned"):
        table.add_column(column, overflow="fold")
    for row in rows:
        earned = ", ".join(f"{r['knob']} {r['earned']:+.3g}" for r in (row["attribution"] or {"rows": ()})["rows"])
        best = (
            "-" if row["held_out"][role] is None else f"{row['held_out'][role]:.4g}" for role in ("uniform", "additive", "random", "found")
        )
        table.add_row(row["model"], ", ".join(row["knobs"]), *best, earned)
    console.print(table)


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    models: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(MODELS),
    seeds: Annotated[str, typer.Option()] = "0",
    trials: Annotated[int, typer.Option(help="Of every search, in full-token equivalents.")] = 250,
) -> None:
    kept: list[Mapping[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        for model in models.split(","):
            row = searched(folder, model, seed, trials)
            kept = add_rows(RESULTS, [row], lambda r: (MODELS.index(r["model"]), r["seed"]), {"trials": trials})
            for knob, reason in row["left_out"].items():
                console.print(f"{model} without {knob}: {reason}")
    show(kept)


if __name__ == "__main__":
    typer.run(main)
