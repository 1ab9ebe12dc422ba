"""FFNs divided into experts against other ways to spare the same share of their arithmetic, alike in every layer.

    python benchmarks/ffn_experts.py MODELS_AND_DATA [--seeds 0,1,2]

`MODELS_AND_DATA` holds `models/babyllama-105` and `data/tinystories-eval.txt`; `demo` is bundled. `ffn_experts` sends tokens to 75, 50 and 25 % of its
experts; `width`, and `activation_sparsity` by the thresholds of CHESS and by magnitude, get the share that takes as many operations as that with
the router, where they have one. Values are KL to the dense model in nats/token on held-out text, and the share of the FFNs' operations and of their bytes
that one token has read. Updates `benchmarks/results/ffn_experts.json` after each model and seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from result_files import add_rows

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import SpaceSpec

RESULTS = Path(__file__).parent / "results" / "ffn_experts.json"
WINDOWS, HELD_OUT, LENGTH = 32, 64, 128
OF_OPERATIONS = {"width": 1, "chess": 3 / 2, "magnitude": 3}  # share of neurons that are spared, over that of a SwiGLU's operations


def measured(setup: EvaluationSetup, knob: str, settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """By level, set everywhere: what is left of the operations and of the bytes read of the FFNs, and the KL."""
    evaluator = Evaluator(EvaluationSetup(**{**vars(setup), "space": SpaceSpec({knob: settings})}))
    space, costs = evaluator.space, CostModel(evaluator.space, batch=1, context=LENGTH)
    weights = sum(site.parameters for site in evaluator.structure.sites if site.kind == "ffn")
    found = []
    for level in space.decisions[0].levels[1:]:
        levels = {decision.key: level for decision in space.decisions}
        spared = {
            name: float(costs.dense(name) - costs.exact(name, space.indices(levels))) for name in ("flops_per_token", "bytes_per_token")
        }
        kl = evaluator.evaluate(EvaluationRequest(levels, "held_out", len(evaluator.preparation.passages["held_out"].inputs)))[0]
        found.append(
            {"operations": 1 - spared["flops_per_token"] / 2 / weights, "read": 1 - spared["bytes_per_token"] / 2 / weights, "kl": kl.value}
        )
    return found


def compared(model: str, source: str | None, seed: int, bank: str) -> list[dict[str, Any]]:
    search, held_out = (TextSpec(source, windows=windows, length=LENGTH) for windows in (WINDOWS, HELD_OUT))
    setup = EvaluationSetup(model, search, None if source else held_out, SpaceSpec({}), seed, "cpu", bank)
    shares = (0.75, 0.5, 0.25)
    rows = [{"share": share, "ffn_experts": found} for share, found in zip(shares, measured(setup, "ffn_experts", {}), strict=True)]
    for name, factor in OF_OPERATIONS.items():
        spared = [(row, (1 - row["ffn_experts"]["operations"]) * factor) for row in rows]
        there = [(row, share) for row, share in spared if share < 1]
        levels: Sequence[float] = [1 - share if name == "width" else share for _, share in there]
        knob, settings = ("width", {"multiple": 1}) if name == "width" else ("activation_sparsity", {"method": name})
        for (row, _), found in zip(there, measured(setup, knob, settings | {"shares": tuple(levels)}), strict=True):
            row[name] = found
    return [{"model": Path(model).name, "seed": seed, **row} for row in rows]


def main(
    folder: Annotated[Path, typer.Argument(help="Holds models/ and data/.")],
    seeds: Annotated[str, typer.Option()] = "0,1,2",
) -> None:
    models = {"demo": None, str(folder / "models" / "babyllama-105"): str(folder / "data" / "tinystories-eval.txt")}
    for seed in map(int, seeds.split(",")):
        for model, source in models.items():
            with tempfile.TemporaryDirectory() as bank:
                rows = compared(model, source, seed, bank)
            add_rows(
                RESULTS, rows, lambda row: (row["model"], -row["share"], row["seed"]), {"windows": [WINDOWS, HELD_OUT], "length": LENGTH}
            )
            for row in rows:
                typer.echo(
                    f"{row['model']} seed {seed} {row['share']:.0%}: "
                    + ", ".join(f"{n} {row[n]['kl']:.4g}" for n in ("ffn_experts", *OF_OPERATIONS) if n in row)
                )


if __name__ == "__main__":
    typer.run(main)
