"""Candidates that compute with packed codes, against the same candidates with decoded values.

Limits. With many rows a CPU decodes the codes to float16 and multiplies in float32: the values are those of the bank where that stores
float16 (`EXACT`: sums in another order), and where it stores bfloat16 each was rounded by up to 2^-9 of itself, 2^-9 / sqrt(3) = 1.1e-3 on
average. With few rows activations, scales, minima and the result are bfloat16, at most four such roundings, 2.3e-3 (`BFLOAT16` leaves the
rest to chance). Errors of L linears add up like sqrt(L).

To second order a KL is half the variance of the difference of logits, so its square root is a norm: with logits that are off by e, it is
off by at most e / sqrt(2) if no token gets less than its usual weight; twice that is allowed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoeff.evaluators import serving
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.serving import forms
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import swap
from autoeff.spaces.space import SpaceSpec

SetupOf = Callable[..., EvaluationSetup]
IDS = torch.arange(12)[None] % 61
EXACT, OF_BFLOAT16_WEIGHTS, BFLOAT16 = 2e-5, 2e-3, 6e-3
ALL = {
    "rank": {"multiple": 4},
    "bits": {"group_size": 32},
    "skip": {},
    "width": {"multiple": 1},
    "heads": {},
    "sparsity": {"ratios": (0.5,)},
}
CUT = {name: ALL[name] for name in ("bits", "skip", "width", "heads")}


def logits(model: nn.Module, tokens: int = 12) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS[:, :tokens].to(next(model.parameters()).device))[0]
    return output.double()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def quality(evaluator: Evaluator, indices: tuple[int, ...], windows: int = 8) -> float:
    return evaluator.evaluate(EvaluationRequest(evaluator.space.at(indices).levels, "search", windows))[0].value


@pytest.mark.parametrize("rows", ["many", "few"])
@pytest.mark.parametrize(("family", "knobs"), [("llama", CUT), ("mistral", ALL), ("gpt2", ALL), ("bert", CUT)])
def test_codes_give_what_decoded_values_give_whatever_else_is_decided(
    setup_of: SetupOf, monkeypatch: pytest.MonkeyPatch, family: str, knobs: dict[str, dict[str, Any]], rows: str
) -> None:
    monkeypatch.setattr(serving, "FEW_ROWS", dict.fromkeys((False, True), 0 if rows == "many" else 99))
    evaluator = Evaluator(setup_of(family, knobs), on_kernels=True)
    candidate, rng = evaluator.candidate, random.Random(3)
    dense = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}
    limit = (EXACT if family in ("llama", "bert") else OF_BFLOAT16_WEIGHTS) if rows == "many" else BFLOAT16
    seen = set()
    for _ in range(4):
        indices = evaluator.space.sample(rng)
        candidate.set(indices, decoded=True)
        assert candidate.kernel_use["packed_linears"] == 0
        expected = logits(evaluator.model)
        candidate.set(indices)
        use = candidate.kernel_use
        assert use["packed_linears"] > 0
        assert candidate.packed is not None
        undo = swap(evaluator.model, {key: dense[key] * torch.nan for key in (f"{name}.weight" for name in candidate.packed.in_force)})
        assert apart(logits(evaluator.model), expected) < limit * len(evaluator.structure.linears) ** 0.5
        undo()
        assert candidate.kernel_use == use | {"packed_calls": use["packed_linears"]}
        taken = forms(evaluator.structure, evaluator.space, evaluator.preparation.knobs, indices)
        assert candidate.packed.in_force == {
            name for name, parts in taken.items() if parts[-1].kernel == "linear_wq" and not parts[0].silenced
        }
        cut = {linear.name: (linear.in_features, linear.out_features) for linear in evaluator.structure.linears}
        for name in candidate.packed.in_force:
            parts = taken[name]
            seen.add((len(parts), (parts[0].linear.in_features, parts[-1].linear.out_features) != cut[name]))
    assert seen >= {(1, False), (1, True)} | ({(2, False), (2, True)} if "rank" in knobs else set())
    candidate.set((0,) * len(indices))
    assert candidate.kernel_use == {"packed_linears": 0, "packed_calls": 0, "decoded_linears": 0}
    assert not any("forward" in vars(evaluator.model.get_submodule(linear.name)) for linear in evaluator.structure.linears)
    assert all(torch.equal(dense[name], tensor) for name, tensor in evaluator.model.state_dict().items())


def test_quality_is_that_of_decoded_values_and_independent_of_what_was_measured_before(
    setup_of: SetupOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "FEW_ROWS", dict.fromkeys((False, True), 1 << 20))
    setup = setup_of("llama", CUT)
    evaluator, decoded, rng = Evaluator(setup, on_kernels=True), Evaluator(setup), random.Random(1)
    candidates = [evaluator.space.sample(rng) for _ in range(5)]
    values = [quality(evaluator, candidate) for candidate in candidates]
    assert evaluator.kernel_use["packed_calls"] > 0
    assert decoded.kernel_use == {}
    scale = float(logits(evaluator.model).var(-1).mean()) ** 0.5
    for candidate, value in zip(candidates, values, strict=True):
        away = BFLOAT16 * len(evaluator.structure.linears) ** 0.5 * scale
        expected = quality(decoded, candidate)
        assert value != expected
        assert abs(value**0.5 - expected**0.5) <= 2 * away / 2**0.5
    rng.shuffle(candidates)
    fresh = Evaluator(setup, on_kernels=True)
    fresh._forward.stride = None
    assert sorted(quality(fresh, candidate) for candidate in candidates) == sorted(values)


def test_metrics_of_the_user_and_exports_meet_decoded_values(setup_of: SetupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "FEW_ROWS", dict.fromkeys((False, True), 0))
    evaluator = Evaluator(setup_of("llama", {"bits": {"group_size": 32}}), on_kernels=True)
    levels: dict[str, Level] = {d.key: 3 for d in evaluator.space.decisions}
    evaluator._metrics = {"values": lambda model, _: float(len(model.model.layers[0].mlp.down_proj.weight[0, :32].unique()))}
    held_out = evaluator.evaluate(EvaluationRequest(levels, "held_out", 8))
    assert held_out[-1].value <= 8
    assert evaluator.kernel_use["packed_linears"] == len(evaluator.structure.linears)
    assert evaluator.kernel_use["packed_calls"] > 0
    evaluator.export(levels, tmp_path / "out")
    assert evaluator.remeasure(tmp_path / "out", "held_out", 8)[0].value == pytest.approx(held_out[0].value, rel=1e-4)


def test_demo_has_the_quality_of_decoded_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored in float16, so that decoded codes are the very same values; 56 linears of a real model add up as random ones do."""
    setup = EvaluationSetup("demo", TextSpec(windows=4, length=64), None, SpaceSpec({"bits": {"store": "nested"}}), 0, "cpu", str(tmp_path))
    evaluator = Evaluator(setup, on_kernels=True)
    evaluator._forward.stride = None
    indices = evaluator.space.sample(random.Random(0))
    monkeypatch.setattr(serving, "FEW_ROWS", dict.fromkeys((False, True), 0))
    many = quality(evaluator, indices, 4)
    assert evaluator.kernel_use["packed_calls"] == 4 * evaluator.kernel_use["packed_linears"] > 0  # a window is a batch
    evaluator.candidate.set(indices, decoded=True)
    decoded = evaluator._quality(evaluator._texts["search"], EvaluationRequest({}, "search", 4))[0].value
    assert many == pytest.approx(decoded, rel=1e-6)
    monkeypatch.setattr(serving, "FEW_ROWS", dict.fromkeys((False, True), 1 << 20))
    few = quality(evaluator, indices, 4)
    assert few != many
    away = BFLOAT16 * len(evaluator.structure.linears) ** 0.5 * float(logits(evaluator.model).var(-1).mean()) ** 0.5
    assert abs(few**0.5 - decoded**0.5) <= 2 * away / 2**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_a_gpu_computes_with_codes_unless_told_otherwise(setup_of: SetupOf, rows: int) -> None:
    """16-bit models; few rows are multiplied by the kernels, more by weights decoded in one launch. The limits are those of 16-bit sums."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for family, limit in (("llama", 2e-3), ("mistral", 1.2e-2), ("gpt2", 2e-3)):
        evaluator = Evaluator(replace(setup_of(family, CUT), device="cuda"))
        decoded, rng = Evaluator(replace(setup_of(family, CUT), device="cuda"), on_kernels=False), random.Random(3)
        for _ in range(4):
            indices = evaluator.space.sample(rng)
            evaluator.candidate.set(indices)
            decoded.candidate.set(indices)
            assert evaluator.candidate.kernel_use["packed_linears"] > 0
            assert apart(logits(evaluator.model, rows), logits(decoded.model, rows)) < limit * len(evaluator.structure.linears) ** 0.5
            value, expected = quality(evaluator, indices), quality(decoded, indices)
            assert evaluator.kernel_use["packed_calls"] > 0
            assert abs(value**0.5 - expected**0.5) <= 0.01
