"""What an evaluation costs beyond a bare forward pass, and what the search adds around it.

    python benchmarks/evaluation_overhead.py [--candidates 200] [--model demo]

Both sides see the same tokens in the same batches and alternate. The bare pass is `model(input_ids).logits` of the dense model. The evaluation
is swap + forward + KL with prefix reuse switched off; with reuse it is reported beside. Writes `benchmarks/results/evaluation_overhead.json`.
"""

from __future__ import annotations

import datetime
import json
import platform
import random
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import transformers
import typer

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "evaluation_overhead.json"


def spread(values: list[float]) -> dict[str, float]:
    quarters = quantiles(values, n=4)
    return {"median": median(values), "lower_quartile": quarters[0], "upper_quartile": quarters[2]}


def inside_the_runner(spec: JobSpec, bank: Path, candidates: int) -> dict[str, Any]:
    """Seconds of the bare pass, of the evaluation, and of the evaluation with prefix reuse, alternating."""
    evaluator = Evaluator(spec.setup(bank))
    passages = evaluator.preparation.passages["search"]
    ids, windows = passages.inputs, len(passages.inputs)
    rng = random.Random(0)
    forward = evaluator._forward
    stride = forward.stride
    times: dict[str, list[float]] = {"bare": [], "evaluation": [], "reuse": []}

    def bare() -> None:
        with torch.no_grad():
            for rows in forward.batches(windows, ids.numel()):
                _ = evaluator.model(input_ids=ids[rows], use_cache=False).logits

    def evaluate(indices: tuple[int, ...]) -> None:
        evaluator.evaluate(EvaluationRequest(evaluator.space.at(indices).levels, "search", windows))

    for number in range(candidates + 3):
        fresh = evaluator.space.sample(rng)
        near = list(fresh)
        near[rng.randrange(len(near))] = 0
        for name, indices in (("bare", None), ("evaluation", fresh), ("reuse", tuple(near))):
            forward.stride = stride if name == "reuse" else None
            started = time.perf_counter()
            if indices is None:
                bare()
            else:
                evaluate(indices)
            if number >= 3:  # the first ones decode every level once
                times[name].append(time.perf_counter() - started)
    ratios = [evaluation / plain for evaluation, plain in zip(times["evaluation"], times["bare"], strict=True)]
    return {"tokens": passages.tokens, "seconds": {name: spread(values) for name, values in times.items()}, "ratio": spread(ratios)}


def around_the_runner(spec: JobSpec, folder: Path) -> dict[str, Any]:
    """Wall time of a whole search against the time inside its evaluations: process, commit, ask and tell together, a trial."""
    started = time.perf_counter()
    result = start(spec, folder / "run", Settings.read())
    wall = time.perf_counter() - started
    return {"trials": len(result.rows), "wall_s": wall, "overhead_ms": result.summary["overhead_ms"]}


def main(
    candidates: Annotated[int, typer.Option(help="Pairs of passes.")] = 200,
    model: Annotated[str, typer.Option(help="A decoder.")] = "demo",
    trials: Annotated[int, typer.Option(help="Budget of the whole search.")] = 120,
) -> None:
    spec = JobSpec.parse({"model": model, "knobs": "bits,skip", "limits": ["linear_bytes<=0.25x"], "budget": {"trials": trials}})
    with tempfile.TemporaryDirectory() as temporary:
        inside = inside_the_runner(spec, Path(temporary), candidates)
        around = around_the_runner(spec, Path(temporary))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "model": model, "candidates": candidates, **inside, "search": around,
    }  # fmt: skip
    print(f"{model}, {inside['tokens']} tokens, {candidates} candidates; milliseconds as median [quartiles]")
    for name, values in inside["seconds"].items():
        print(f"  {name:11s} {values['median'] * 1e3:8.1f} [{values['lower_quartile'] * 1e3:.1f}, {values['upper_quartile'] * 1e3:.1f}]")
    print(
        f"  evaluation / bare, pair by pair: {inside['ratio']['median']:.3f} [{inside['ratio']['lower_quartile']:.3f}, {inside['ratio']['upper_quartile']:.3f}]"
    )
    print("  around it, median of a trial: " + ", ".join(f"{name} {value:.1f} ms" for name, value in around["overhead_ms"].items()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
