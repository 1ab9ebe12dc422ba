"""Spearman on STS-B (dev) against bytes along the front of a sentence encoder.

    python benchmarks/encoder_front.py MODELS_AND_DATA [--trials 300]

`MODELS_AND_DATA` holds `models/minilm-l6`, `data/stsb-train.csv` (searched by the cosine to the dense embedding, scores unused) and
`data/stsb-dev.csv` (1,500 pairs, judged). Prints the front and the uniform levels and writes `benchmarks/results/encoder_front.json`.
"""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "encoder_front.json"


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    trials: Annotated[int, typer.Option(help="Budget in full-token equivalents.")] = 300,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    spec = JobSpec.parse(
        {
            "model": str(folder / "models" / "minilm-l6"),
            "data": {"source": str(folder / "data" / "stsb-train.csv"), "windows": 256},
            "eval_data": {"source": str(folder / "data" / "stsb-dev.csv"), "windows": 0},
            "knobs": {"bits": {"group_size": 32}, "skip": {}},
            "objectives": ["quality", "linear_bytes"],
            "budget": {"trials": trials},
            "seed": seed,
        }
    )
    with tempfile.TemporaryDirectory() as temporary:
        result = start(spec, Path(temporary) / "run", Settings.read())
    summary = result.summary
    dense_bytes = next(row for row in summary["rows"] if row["role"] == "dense")["costs"]["linear_bytes"]
    rows = [
        {"role": "front", "label": "", "linear_bytes": row["measurements"]["linear_bytes"]["value"], **values(row)}
        for row in result.front
        if "spearman_held_out" in row["measurements"]
    ]
    rows += [
        {
            "role": row["role"],
            "label": row["label"] or "",
            "linear_bytes": row["costs"]["linear_bytes"],
            **{name: row[key] for name, key in (("damage", "search"), ("damage_held_out", "held_out"), ("spearman", "spearman_held_out"))},
        }
        for row in summary["rows"]
        if row["role"] in ("dense", "uniform")
    ]
    rows.sort(key=lambda row: row["linear_bytes"])
    table = Table(title="all-MiniLM-L6-v2: STS-B dev Spearman against stored bytes of the linears")
    for column in ("bytes", "of dense", "configuration", "1 - cosine, search", "held out", "Spearman"):
        table.add_column(column, justify="right")
    for row in rows:
        name = f"{row['role']} {row['label']}".strip()
        share = f"{row['linear_bytes'] / dense_bytes:.1%}"
        table.add_row(
            f"{row['linear_bytes']:,.0f}", share, name, f"{row['damage']:.4f}", f"{row['damage_held_out']:.4f}", f"{row['spearman']:.4f}"
        )
    Console(width=120).print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "date": datetime.date.today().isoformat(),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
                "evaluations": summary["evaluations"],
                "seconds": summary["seconds"],
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )


def values(row: dict) -> dict[str, float]:
    """Search and held-out figures of a public row."""
    names = {"damage": "damage_cosine", "damage_held_out": "damage_cosine_held_out", "spearman": "spearman_held_out"}
    return {key: row["measurements"][name]["value"] for key, name in names.items()}


if __name__ == "__main__":
    typer.run(main)
