"""Held-out damage of every quantizer, pruning criterion and unit criterion, the same level everywhere, side by side.

    python benchmarks/method_fronts.py MODELS_AND_DATA [--models stories260K,demo] [--seeds 0,1,2]

`MODELS_AND_DATA` holds `models/{stories260K,babyllama-105,minilm-l6}`, `data/tinystories-{train,eval}.txt` and
`data/stsb-{train,dev}.csv`; `demo` is bundled with its text. Decoders: KL in nats/token over 32 windows of 128 tokens, calibrated on
16 others; encoder: 1 - cosine over 256 sentences, calibrated on 256 others. The seed draws both. Prints tables, each value the mean
over the seeds with the sample standard deviation, and updates `benchmarks/results/method_fronts.json`.
"""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.configuration import Level
from autoeff.spaces.space import SpaceSpec

RESULTS = Path(__file__).parent / "results" / "method_fronts.json"
MODELS = ("stories260K", "babyllama-105", "demo", "minilm-l6")
QUANTIZERS = ("rtn", "hqq", "gptq")
CRITERIA = ("magnitude", "wanda", "nirvana", "sparsegpt")
UNIT_CRITERIA = ("magnitude", "wanda", "nirvana")
console = Console(width=140)


@dataclass(frozen=True)
class Method:
    """A knob with its settings, and the levels that it is measured at, one at a time at every site."""

    table: str
    name: str
    knob: str
    settings: Mapping[str, Any]
    levels: tuple[Level, ...]


def methods() -> Iterator[Method]:
    for kind, symmetric in (("asymmetric", False), ("symmetric", True)):
        bits = {"symmetric": symmetric}
        yield Method(f"bits, {kind}", "rtn, nested", "bits", bits | {"store": "nested"}, (8, 6, 4, 3, 2))
        for name in QUANTIZERS:
            yield Method(f"bits, {kind}", name, "bits", bits | {"quantizer": name}, (8, 6, 4, 3, 2))
    for name in CRITERIA:
        yield Method("sparsity", name, "sparsity", {"criterion": name}, (0.25, 0.5, 0.75))
        yield Method("sparsity", name, "sparsity", {"criterion": name, "pattern": "2:4"}, ("2:4",))
    for knob in ("width", "heads"):
        for name in UNIT_CRITERIA:
            yield Method(knob, name, knob, {"criterion": name, "shares": (0.75, 0.5)}, (0.75, 0.5))


def setup(folder: Path, model: str, method: Method, seed: int, bank: Path) -> EvaluationSetup:
    if model == "demo":
        path, data, held_out = model, TextSpec(windows=16, length=128), TextSpec(windows=32, length=128)
    elif model == "minilm-l6":
        path = str(folder / "models" / model)
        data = TextSpec(str(folder / "data" / "stsb-train.csv"), windows=256)
        held_out = TextSpec(str(folder / "data" / "stsb-dev.csv"), windows=256)
    else:
        path = str(folder / "models" / model)
        data = TextSpec(str(folder / "data" / "tinystories-train.txt"), windows=16, length=128)
        held_out = TextSpec(str(folder / "data" / "tinystories-eval.txt"), windows=32, length=128)
    return EvaluationSetup(path, data, held_out, SpaceSpec({method.knob: method.settings}), seed, "cpu", str(bank))


def values(folder: Path, model: str, method: Method, seed: int, bank: Path) -> dict[Level, float]:
    """Held-out damage by level, of levels that some site has; sites that lack one take the last that they have before it."""
    evaluator = Evaluator(setup(folder, model, method, seed, bank))
    decisions = evaluator.space.decisions
    order = (decisions[0].levels[0], *method.levels)
    found = {}
    for number, level in enumerate(order[1:], start=1):
        if not any(level in d.levels for d in decisions):
            continue
        chosen = {d.key: next(item for item in reversed(order[: number + 1]) if item in d.levels) for d in decisions}
        windows = len(evaluator.preparation.passages["held_out"].inputs)
        found[level] = evaluator.evaluate(EvaluationRequest(chosen, "held_out", windows))[0].value
    return found


def bytes_of(bank: Path) -> int:
    return sum(path.stat().st_size for path in bank.rglob("*.safetensors"))


def row(folder: Path, model: str, method: Method, seeds: list[int], work: Path) -> dict[str, Any]:
    started, bank = time.perf_counter(), work / f"{method.table}-{method.name}-{'-'.join(map(str, method.levels))}".replace(":", "")
    by_seed = [values(folder, model, method, seeds[0], bank)]
    size = bytes_of(bank)
    by_seed += [values(folder, model, method, seed, bank) for seed in seeds[1:]]
    levels = {
        str(level): {"mean": mean(v[level] for v in by_seed), "sd": stdev(v[level] for v in by_seed) if len(seeds) > 1 else None}
        for level in by_seed[0]
    }
    seconds = time.perf_counter() - started
    return {"model": model, "table": method.table, "method": method.name, "bank_bytes": size, "seconds": seconds, "levels": levels}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    merged: dict[str, dict[str, Any]] = {}
    for item in rows:
        merged.setdefault(item["method"], {}).update(item["levels"])
    names = list(dict.fromkeys(level for levels in merged.values() for level in levels))
    table = Table(title=title)
    for column in ("", *names, *(["bank bytes"] if "bits" in title else [])):
        table.add_column(column, justify="right")
    for method, levels in merged.items():
        cells = [f"{v['mean']:.4g}" + ("" if v["sd"] is None else f" ± {v['sd']:.2g}") for v in (levels[name] for name in names)]
        size = [f"{next(item['bank_bytes'] for item in rows if item['method'] == method):,}"] if "bits" in title else []
        table.add_row(method, *cells, *size)
    console.print(table)


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    models: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(MODELS),
    seeds: Annotated[str, typer.Option()] = "0,1,2",
    only: Annotated[str, typer.Option(help="Only tables whose name begins so; writes no file.")] = "",
) -> None:
    for model in models.split(","):
        with tempfile.TemporaryDirectory() as work:
            rows = [
                row(folder, model, method, [int(seed) for seed in seeds.split(",")], Path(work))
                for method in methods()
                if method.table.startswith(only)
            ]
        for name in dict.fromkeys(item["table"] for item in rows):
            show(f"{model}: {name}", [item for item in rows if item["table"] == name])
        if not only:
            keep(model, seeds, rows)


def keep(model: str, seeds: str, rows: list[dict[str, Any]]) -> None:
    """Puts the model's results into the file, beside those of others."""
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[model] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "seeds": seeds,
        "seconds": round(sum(item["seconds"] for item in rows)),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
