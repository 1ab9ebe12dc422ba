"""How well composed latency agrees with that of whole models: held-out random configurations, predicted and measured end to end.

    python benchmarks/latency_model.py [--configurations 20] [--model demo --model DIR] [--knobs bits,skip,width,heads] [--context 256]

Run it on a quiet machine: times of a busy one tell about its other guests. The constants of a model are fitted to configurations drawn from
another seed. Measured are served models (packed weights, kernels, real shapes), all alternating. Values of quantised weights come from the
bank, as in a search. Encoders have no decoding. Goals on a CPU: median error at most 10 %, Spearman at least 0.95.
Prints a table; writes `benchmarks/results/latency_model.json`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer

from autoeff.evaluators.correlation import spearman
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.latency_table import PHASES
from autoeff.evaluators.loading import inspect_model, resolve_model
from autoeff.evaluators.preparation import prepare
from autoeff.evaluators.setup import LatencySpec
from autoeff.search.job import JobSpec
from autoeff.spaces.costs import CostModel

RESULTS = Path(__file__).parent / "results" / "latency_model.json"
SENTENCE = "the dog sat on the mat and the cat ate the hat while all the others went there again and again\n"
HELD_OUT_SEED = 20_000  # constants are fitted to draws of seed 0


def agreement(model: str, knobs: list[str], configurations: int, context: int, folder: Path) -> dict[str, Any]:
    """Predicted and measured milliseconds of every configuration, and what their differences amount to."""
    decoder = inspect_model(resolve_model(model)).task == "decoder"
    text = folder / "text.txt"
    text.write_text(SENTENCE * 400)
    data = {"source": str(text), "windows": 4, "length": 64}
    spec = JobSpec.parse({"model": model, "knobs": knobs, "data": data, "eval_data": data, "context": context})
    latency = LatencySpec(PHASES if decoder else ("prefill",), 1, context, str(folder / "latency"))
    setup = spec.setup(folder / "bank")
    planned = prepare(replace(setup, latency=latency))
    costs = CostModel(planned.space, batch=1, context=context)
    evaluator, rng = Evaluator(setup), random.Random(HELD_OUT_SEED)
    drawn = {"dense": (0,) * len(planned.space.decisions)}
    drawn |= {f"random {number}": planned.space.sample(rng) for number in range(configurations)}
    measured = evaluator.latency({label: planned.space.at(indices).levels for label, indices in drawn.items()}, latency)
    rows = [
        {
            "label": label,
            **{
                found.name: {
                    "predicted": float(costs.exact(found.name, drawn[label])), "measured": found.value, "spread": found.spread,
                }
                for found in measurements
            },
        }
        for label, measurements in measured.items()
    ]  # fmt: skip
    assert planned.latency is not None
    return {"model": Path(model).name, "device": planned.latency.device, "knobs": knobs, "context": context, "rows": rows, **verdict(rows)}


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By measure: relative errors and rank correlation over the random configurations."""
    found = {}
    for name in (name for name in ("decode_ms", "prefill_ms") if name in rows[0]):
        pairs = [(row[name]["predicted"], row[name]["measured"]) for row in rows if row["label"] != "dense"]
        errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
        rank = spearman(*zip(*pairs, strict=True)) if len(pairs) > 2 else None
        found[name] = {"median_error": median(errors), "largest_error": max(errors), "spearman": rank, "configurations": len(pairs)}
    return {"agreement": found}


def main(
    configurations: Annotated[int, typer.Option(min=1)] = 20,
    model: Annotated[list[str] | None, typer.Option()] = None,
    knobs: str = "bits,skip,width,heads",
    context: int = 256,
    write: Annotated[bool, typer.Option(help="Leave the result file.")] = True,
) -> None:
    """Measures, prints and writes."""
    load, results = os.getloadavg()[0], []
    for name in model or ["demo"]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(agreement(name, knobs.split(","), configurations, context, Path(folder)))
    for result in results:
        for name, found in result["agreement"].items():
            typer.echo(f"\n{result['model']} {name}: {result['device']}, context {result['context']}, {', '.join(result['knobs'])}")
            for row in result["rows"]:
                values = row[name]
                error = values["predicted"] / values["measured"] - 1
                typer.echo(f"{row['label']:>10}  predicted {values['predicted']:8.3f}  measured {values['measured']:8.3f}  {error:+7.1%}")
            typer.echo(
                f"median error {found['median_error']:.1%} (goal 10 %), largest {found['largest_error']:.1%}, "
                f"Spearman {found['spearman']:.3f} (goal 0.95)"
            )
    if write:
        about = {
            "command": "python benchmarks/latency_model.py", "date": datetime.date.today().isoformat(), "load_before": load,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"format": 1, **about, "models": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
