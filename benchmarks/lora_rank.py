"""Ranks of adapters: do prefixes of one adapter rank like adapters trained from scratch, and are searched ranks better than others?

    python benchmarks/lora_rank.py MODELS_AND_DATA [--seeds 0,1,2] [--tokens 100000] [--vectors 20] [--trials 120]

`MODELS_AND_DATA` holds `models/babyllama-105` and `data/tinyshakespeare.txt`, to which the model is tuned: three fifths are trained on, the
fourth is searched on, the last is held out. First part, seed 0: random rank vectors, what the super-adapter says of each, and the loss of
adapters trained from scratch at these ranks. Second part: at a quarter of the parameters of rank 16 everywhere, ranks that are searched,
that EVA gives and that are uniform, each trained from scratch, and AdaLoRA (arXiv:2303.10512, by `peft`), which starts from 1.5 times rank 4
and drops terms while it trains. All see the same tokens in the same order, at every one of the same learning rates; each method is
judged at the rate that is best for it on the search text. What is searched is what a search calls found, for which finalists are compared on
the held-out text, too. Writes `benchmarks/results/lora_rank.json`.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from result_files import add_rows
from rich.console import Console
from torch.nn.functional import cross_entropy

from autoeff.evaluators.correlation import spearman
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.loading import load_model
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.evaluators.super_adapter import tuned
from autoeff.evaluators.text import Passages
from autoeff.evaluators.training import Course, train
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings
from autoeff.spaces.adapters import attached
from autoeff.spaces.knobs.lora_rank import LoraRank

RESULTS = Path(__file__).parent / "results" / "lora_rank.json"
LENGTH, WINDOWS, HELD_OUT = 128, 32, 200
RANK, LIMIT = 4, "trainable_parameters<=0.25x"
RATES = (0.005, 0.01, 0.02)  # 0.04 is worse for every method (seed 0: 1.93 to 3.03)
ADALORA_TERMS = 0.87  # of rank 4 everywhere: it drops terms of small linears first, and would end with more parameters than the others
METHODS = ("searched", "uniform", "eva", "adalora")
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


def vectors(evaluator: Evaluator, count: int) -> list[dict[str, Any]]:
    """Random ones, of few parameters and of many: what the super-adapter says of them, and what training from scratch gives."""
    rows = []
    for number in range(count):
        rng = random.Random(number)
        odds = [rng.random() for _ in range(5)]
        space = evaluator.space
        indices = [rng.choices(range(len(d.levels)), odds)[0] for d in space.decisions]
        started, levels = time.perf_counter(), dict(space.at(indices).levels)
        found = {m.name: m.value for m in evaluator.evaluate(EvaluationRequest(levels, "search", WINDOWS))}
        found |= {m.name: m.value for m in evaluator.evaluate(EvaluationRequest(levels, "held_out", HELD_OUT))}
        scratch = {m.name: m.value for m in evaluator.trained(levels)}
        row = {"part": "vectors", "seed": 0, "method": f"random {number:02}", "kl": found["kl"], "loss_super": found["loss_held_out"]}
        row |= {"loss_scratch": scratch["loss_held_out"], "trainable_parameters": space.primary(indices)["trainable_parameters"]}
        rows.append(row | {"seconds": round(time.perf_counter() - started, 1)})
        console.print(row)
    return rows


class Tuning:
    """What all methods have in common: the model, the texts and the course of a training, at any learning rate.

    Args:
        preparation: Of the job.
        folder: Where finished adapters are kept.
        seed: Of the job.
    """

    def __init__(self, preparation: Preparation, folder: Path, seed: int) -> None:
        self.preparation, self.folder = preparation, folder
        self.model: Any = load_model(preparation.facts, preparation.device)
        knob, text = preparation.knobs["lora_rank"], preparation.tuning
        assert isinstance(knob, LoraRank)
        assert text is not None
        self.text, self.course = text, Course(knob.tokens, knob.batch, knob.learning_rate, knob.optimizer, seed)
        decided = {decision.site for decision in preparation.space.decisions}
        self.sites = {site.name: site.linears for site in preparation.structure.sites if site.name in decided}

    def lora(self, levels: Mapping[str, Any], rate: float) -> dict[str, float]:
        """Losses on both texts of adapters trained from scratch at the given ranks."""
        ranks = {d.site: [int(levels[d.key])] for d in self.preparation.space.decisions}
        course = replace(self.course, learning_rate=rate)
        head, digest = self.model.get_output_embeddings(), self.preparation.facts.digest
        take_away = attached(self.model, tuned(self.model, head, self.sites, ranks, self.text, course, self.folder, digest))
        found = self.losses(self.model)
        take_away()
        return found

    def adalora(self, rate: float) -> dict[str, float]:
        """The same of AdaLoRA, and the parameters of the terms that it kept; all else is as its paper and `peft` have it.

        A tenth of the steps goes before terms are dropped, four tenths follow after.
        """
        from peft import AdaLoraConfig, get_peft_model

        torch.manual_seed(self.course.seed)
        course, names = replace(self.course, learning_rate=rate), [linear.name for linears in self.sites.values() for linear in linears]
        steps = course.steps(self.text.length)
        config = AdaLoraConfig(
            init_r=3 * RANK // 2, target_r=RANK, lora_alpha=3 * RANK, total_step=steps, tinit=steps // 10, tfinal=steps * 4 // 10,
            target_modules=names,
        )  # fmt: skip
        model: Any = get_peft_model(copy.deepcopy(self.model), config)

        def loss(step: int, rows: torch.Tensor) -> torch.Tensor:
            ids = self.text.inputs[rows]
            found: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss  # with what keeps terms orthogonal
            return found

        def allocate(done: int, total: int) -> None:
            model.base_model.update_and_allocate(done)

        model.base_model.rankallocator.target_bgt = round(ADALORA_TERMS * RANK * len(names))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        train(parameters, loss, len(self.text.inputs), self.text.length, course, progress=allocate)
        layers = [model.base_model.model.get_submodule(name) for name in names]
        kept = [int(layer.lora_E["default"].count_nonzero()) * (layer.in_features + layer.out_features + 1) for layer in layers]
        return self.losses(model) | {"trainable_parameters": sum(kept)}

    @torch.no_grad()
    def losses(self, model: Any) -> dict[str, float]:
        """Nats per token on the search and the held-out text."""
        return {split: _loss(model, passages) for split, passages in self.preparation.passages.items()}


def _loss(model: Any, passages: Passages) -> float:
    total = 0.0
    for ids in passages.inputs.split(8):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (len(passages.inputs) * (passages.length - 1))


def methods(spec: JobSpec, home: Path) -> list[dict[str, Any]]:
    """A row for each method, at the learning rate that is best on the search text."""
    settings = Settings(home=home)
    result = start(spec, home / f"run-{spec.seed}", settings)
    assert result.found is not None
    names = {"eva": "eva", f"lora_rank={RANK}": "uniform"}
    chosen = {"searched": result.found} | {names[row["label"]]: row for row in result.rows if row.get("label") in names}
    setup = spec.setup(settings.bank)
    tuning = Tuning(prepare(setup), Path(setup.bank) / "adapters", spec.seed)
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"part": "methods", "seed": spec.seed, "method": method}
        if method in chosen:
            measured = {name: m["value"] for name, m in chosen[method]["measurements"].items()}
            by_rate = {rate: tuning.lora(chosen[method]["configuration"], rate) for rate in RATES}
            row |= {"kl": measured["kl"], "loss_super": measured["loss_held_out"]}
        else:
            measured, by_rate = {}, {rate: tuning.adalora(rate) for rate in RATES}
        rate = min(by_rate, key=lambda rate: by_rate[rate]["search"])
        row |= {"learning_rate": rate, "loss_scratch": by_rate[rate]["held_out"], "by_rate": {f"{r:g}": v for r, v in by_rate.items()}}
        rows.append(row | {"trainable_parameters": (measured | by_rate[rate])["trainable_parameters"]})
        console.print(rows[-1])
    return rows


def said(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank correlations over the vectors; losses over the seeds, and how much less what was searched has than each, seed by seed."""
    found: dict[str, Any] = {}
    vectors = [row for row in rows if row["part"] == "vectors"]
    if len(vectors) > 2:
        scratch = torch.tensor([row["loss_scratch"] for row in vectors])
        for name in ("kl", "loss_super", "trainable_parameters"):
            score = torch.tensor([row[name] for row in vectors], dtype=torch.float64)
            found[f"spearman_{name}"] = round(spearman(-score if name == "trainable_parameters" else score, scratch), 3)
    of = {method: {row["seed"]: row for row in rows if row["part"] == "methods" and row["method"] == method} for method in METHODS}
    for method, by_seed in of.items():
        if by_seed:
            gains = [row["loss_scratch"] - of["searched"][seed]["loss_scratch"] for seed, row in by_seed.items()]
            found[method] = {
                "loss_scratch": round(mean(row["loss_scratch"] for row in by_seed.values()), 4),
                "trainable_parameters": round(mean(row["trainable_parameters"] for row in by_seed.values())),
                "searched_has_less": {"mean": round(mean(gains), 4), "deviation": round(stdev(gains), 4) if len(gains) > 1 else None},
            }
    return found


def main(
    folder: Path,
    seeds: str = "0,1,2",
    tokens: Annotated[int, typer.Option(help="Of every training.")] = 100_000,
    vectors_: Annotated[int, typer.Option("--vectors", help="Random rank vectors.")] = 20,
    trials: Annotated[int, typer.Option(help="Of every search.")] = 120,
) -> None:
    """Measures, writes and prints."""
    settings = {"tokens": tokens, "length": LENGTH, "limit": LIMIT, "model": "babyllama-105", "text": "tinyshakespeare"}

    def write(rows: list[dict[str, Any]]) -> None:
        kept = add_rows(RESULTS, rows, lambda row: (row["part"], row["seed"], row["method"]), settings, said)
        console.print(said(kept))

    with tempfile.TemporaryDirectory() as home:
        for seed in map(int, filter(None, seeds.split(","))):
            write(methods(job(folder, seed, tokens, trials), Path(home)))
        if vectors_:
            write(vectors(Evaluator(job(folder, 0, tokens, trials).setup(Settings(home=Path(home)).bank)), vectors_))


if __name__ == "__main__":
    typer.run(main)
