"""Every family under every knob at once: exact identities, exact bytes, exports that measure the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.space import SpaceSpec

KNOBS = {
    "bits": {"group_size": 16},
    "sparsity": {"criterion": "magnitude", "ratios": (0.5,)},
    "skip": {},
    "width": {"criterion": "magnitude", "multiple": 1},
    "heads": {"criterion": "magnitude"},
    "activation_sparsity": {"shares": (0.5,)},
}
_EXPERTS = {"experts": {}, "experts_kept": {}}


@pytest.fixture
def setup(every_family: str, stored_family: Path, tmp_path: Path) -> EvaluationSetup:
    text = tmp_path / "text.txt"
    text.write_text("the dog sat on the mat and the cat ate the hat while all the others went there again\n" * 40)
    mixed = {"width", "activation_sparsity"}
    without = {"falcon_multi_query": {"heads"}, "olmoe": {"heads", *mixed}, "mixtral": mixed, "qwen3_moe": mixed}
    knobs = {name: settings for name, settings in KNOBS.items() if name not in without.get(every_family, ())}
    knobs |= _EXPERTS if every_family in (*without, "qwen2_moe") and every_family != "falcon_multi_query" else {}
    data = TextSpec(str(text), windows=4, length=12)
    return EvaluationSetup(str(stored_family), data, None, SpaceSpec(knobs), 0, "cpu", str(tmp_path / "bank"))


def test_candidates_have_the_bytes_that_they_cost_and_leave_no_trace(setup: EvaluationSetup, tmp_path: Path) -> None:
    check_candidates(setup, tmp_path)


def test_so_have_those_of_a_model_of_images(tiny_vit: Path, tiny_images: Path, tmp_path: Path) -> None:
    data = TextSpec(str(tiny_images), windows=4)
    check_candidates(EvaluationSetup(str(tiny_vit), data, None, SpaceSpec(KNOBS), 0, "cpu", str(tmp_path / "bank")), tmp_path)


def check_candidates(setup: EvaluationSetup, tmp_path: Path) -> None:
    evaluator, rng = Evaluator(setup), random.Random(0)
    space = evaluator.space
    before = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}

    def value(indices: tuple[int, ...]) -> float:
        return evaluator.evaluate(EvaluationRequest(space.at(indices).levels, "search", 4))[0].value

    drawn = [space.sample(rng) for _ in range(6)]
    kept = [space.normalised([0 if d.knob == "skip" else i for d, i in zip(space.decisions, x, strict=True)]) for x in drawn]
    values = {x: value(x) for x in [*drawn, *kept] if any(x)}
    for indices, expected in values.items():
        assert sum(evaluator.stored_bytes(space.at(indices).levels).values()) == space.primary(indices)["linear_bytes"]
        assert value(indices) == expected > 0.0
    assert value((0,) * len(space.decisions)) == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in evaluator.model.state_dict().items())
    evaluator.export(space.at(kept[0]).levels, tmp_path / "out")
    found = Evaluator(setup).remeasure(tmp_path / "out", "search", 4, space.at(kept[0]).levels)
    assert found[0].value == pytest.approx(values[kept[0]], rel=1e-5, abs=1e-8)
