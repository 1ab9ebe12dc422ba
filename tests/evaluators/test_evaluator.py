"""Candidates measured on tiny models: identities, determinism, export, real models."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from autoeff.errors import CandidateError, InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.space import SpaceSpec

SetupOf = Callable[..., EvaluationSetup]
BOTH = {"bits": {"group_size": 16}, "skip": {}}
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


def value(evaluator: Evaluator, indices: tuple[int, ...], split: str = "search", windows: int = 8) -> float:
    levels = evaluator.space.at(indices).levels
    return evaluator.evaluate(EvaluationRequest(levels, split, windows))[0].value  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_dense_is_an_exact_identity_after_any_candidate(setup_of: SetupOf, family: str) -> None:
    evaluator = Evaluator(setup_of(family, BOTH))
    before = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}
    dense = (0,) * len(evaluator.space.decisions)
    assert value(evaluator, dense) == 0.0
    rng = random.Random(0)
    for _ in range(5):
        assert value(evaluator, evaluator.space.sample(rng)) > 0.0
    assert value(evaluator, dense) == 0.0
    assert value(evaluator, dense, "held_out") == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in evaluator.model.state_dict().items())


def test_a_value_does_not_depend_on_what_was_measured_before_it(setup_of: SetupOf) -> None:
    evaluator, rng = Evaluator(setup_of("llama", BOTH)), random.Random(1)
    candidates = [evaluator.space.sample(rng) for _ in range(6)]
    values = [value(evaluator, c) for c in candidates]
    rng.shuffle(candidates)
    again = {c: value(evaluator, c) for c in candidates}
    fresh = Evaluator(setup_of("llama", BOTH))
    fresh._forward.stride = None
    assert sorted(values) == sorted(again.values())
    assert all(value(fresh, c) == v for c, v in again.items())


def test_fewer_windows_are_the_first_of_all_windows(setup_of: SetupOf) -> None:
    evaluator, rng = Evaluator(setup_of("qwen3", BOTH)), random.Random(2)
    candidate = evaluator.space.sample(rng)
    few = evaluator.evaluate(EvaluationRequest(evaluator.space.at(candidate).levels, "search", 2))[0]
    assert few.tokens == 2 * 16
    assert few.value != value(evaluator, candidate)
    with pytest.raises(InputError, match="99 windows were asked for; the search text has 8"):
        value(evaluator, candidate, windows=99)


def test_perplexity_is_measured_on_held_out_text_only(setup_of: SetupOf) -> None:
    evaluator = Evaluator(setup_of("gpt2", BOTH))
    dense = evaluator.space.dense_configuration.levels
    assert [m.name for m in evaluator.evaluate(EvaluationRequest(dense, "search", 8))] == ["kl"]
    names = [m.name for m in evaluator.evaluate(EvaluationRequest(dense, "held_out", 8))]
    assert names == ["kl_held_out", "perplexity_held_out"]


@pytest.mark.parametrize(("windows", "beside"), [(8, True), (0, False)])
def test_statistics_are_of_text_beside_that_of_the_search(setup_of: SetupOf, windows: int, beside: bool) -> None:
    setup = setup_of("llama", {"sparsity": {"criterion": "wanda"}})
    evaluator = Evaluator(replace(setup, data=replace(setup.data, windows=windows)))
    preparation, searched = evaluator.preparation, evaluator.preparation.passages["search"]
    text = preparation.calibration
    assert text is not None
    assert (text is not searched) == beside == (not any("fitted to the search text itself" in notice for notice in preparation.notices))
    assert preparation.report()["text"]["calibration"]["digest"] == text.digest == evaluator.bank.statistics.text_digest
    (first, *_) = evaluator.structure.linears
    seen = []
    handle = evaluator.model.get_submodule(first.name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        evaluator.model(input_ids=text.inputs)
    handle.remove()
    expected = seen[0].flatten(0, 1).double().norm(dim=0)
    torch.testing.assert_close(evaluator.bank.statistics.tensors[f"{first.name}.input_norm"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert"])
def test_a_criterion_that_needs_gradients_gets_those_of_the_dense_model(setup_of: SetupOf, family: str) -> None:
    """Units are cut before weights are pruned, by gradients that are cut with them."""
    settings = {"criterion": "nirvana"}
    knobs = {"width": {**settings, "multiple": 1}, "heads": settings, "sparsity": {**settings, "ratios": (0.5,)}}
    evaluator = Evaluator(setup_of(family, knobs))
    statistics = evaluator.bank.statistics.tensors
    assert statistics.keys() == {f"{linear.name}.gradient" for linear in evaluator.structure.linears}
    assert all(tensor.any() for tensor in statistics.values())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in evaluator.model.parameters())
    levels = evaluator.space.at([1] * len(evaluator.space.decisions)).levels
    dense, pruned = (evaluator.evaluate(EvaluationRequest(chosen, "search", 8))[0].value for chosen in ({}, levels))
    assert dense == 0.0 < pruned


@pytest.mark.parametrize("family", DECODERS)
def test_bytes_counted_from_packed_tensors_equal_the_cost_model(setup_of: SetupOf, family: str) -> None:
    evaluator, rng = Evaluator(setup_of(family, BOTH, untie=True)), random.Random(3)
    for _ in range(10):
        indices = evaluator.space.sample(rng)
        stored = evaluator.stored_bytes(evaluator.space.at(indices).levels)
        assert sum(stored.values()) == evaluator.space.primary(indices)["linear_bytes"]


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_an_exported_model_measures_what_the_candidate_measured(setup_of: SetupOf, family: str, tmp_path: Path) -> None:
    setup = setup_of(family, BOTH)
    evaluator, rng = Evaluator(setup), random.Random(4)
    indices = evaluator.space.sample(rng)
    expected = value(evaluator, indices)
    files = evaluator.export(evaluator.space.at(indices).levels, tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    found = Evaluator(setup).remeasure(tmp_path / "out", "search", 8)
    assert found[0].value == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_an_exported_model_generates_with_transformers_alone(setup_of: SetupOf, tmp_path: Path) -> None:
    evaluator = Evaluator(setup_of("llama", BOTH))
    indices = evaluator.space.sample(random.Random(5))
    evaluator.export(evaluator.space.at(indices).levels, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    evaluator.candidate.set(indices)
    ids = torch.tensor([[0, 5, 9, 12]])
    torch.testing.assert_close(model(ids).logits, evaluator.model(ids).logits)


def test_a_skipped_sublayer_adds_nothing_to_the_residual_stream(setup_of: SetupOf) -> None:
    evaluator = Evaluator(setup_of("llama", {"skip": {}}))
    attention = evaluator.model.get_submodule("model.layers.1.self_attn")
    found = []
    attention.register_forward_hook(lambda module, args, output: found.append(output[0]))
    levels = {"model.layers.1.self_attn:skip": "skip"}
    evaluator.evaluate(EvaluationRequest(evaluator.space.configuration(levels).levels, "search", 8))
    assert not found[-1].any()


def test_a_third_party_knob_is_measured_like_any_other(setup_of: SetupOf, third_party_knobs: Path) -> None:
    evaluator = Evaluator(setup_of("llama", {"noise": {"seed": 3}}))
    assert evaluator.bank.built == 3 * len(evaluator.space.decisions)
    assert 0 < value(evaluator, (1,) * len(evaluator.space.decisions)) < value(evaluator, (3,) * len(evaluator.space.decisions))


def test_outputs_that_are_not_finite_are_a_failure(setup_of: SetupOf, third_party_knobs: Path) -> None:
    evaluator = Evaluator(setup_of("llama", {"faulty": {}}))
    with pytest.raises(CandidateError, match="not finite"):
        value(evaluator, (5, 0, 0))


def test_dense_perplexities_are_those_of_the_model_cards(shared: Path, tmp_path: Path) -> None:
    """Protocol of the cards: documents with a BOS each, windows of the whole context, first 8,192 ids."""
    for name, context, expected in (("stories260K", 512, 4.3999), ("babyllama-105", 256, 2.3353)):
        text = TextSpec(
            str(shared / "data" / "tinystories-eval.txt"), windows=8192 // context, length=context, bos="per_document", draw="first"
        )
        setup = EvaluationSetup(str(shared / "models" / name), text, text, SpaceSpec({"skip": {}}), 0, "cpu", str(tmp_path))
        evaluator = Evaluator(setup)
        dense = evaluator.space.dense_configuration.levels
        found = evaluator.evaluate(EvaluationRequest(dense, "held_out", 8192 // context))[1]
        assert found.name == "perplexity_held_out"
        assert found.tokens == 8192 - 8192 // context
        assert found.value == pytest.approx(expected, abs=5e-4)


@pytest.mark.slow
def test_dense_spearman_is_that_of_the_model_card(shared: Path, tmp_path: Path) -> None:
    data = TextSpec(str(shared / "data" / "stsb-train.csv"), windows=8)
    setup = EvaluationSetup(
        str(shared / "models" / "minilm-l6"),
        data,
        TextSpec(str(shared / "data" / "stsb-dev.csv"), windows=0),
        SpaceSpec({"skip": {}}),
        0,
        "cpu",
        str(tmp_path),
    )
    evaluator = Evaluator(setup)
    found = evaluator.evaluate(EvaluationRequest(evaluator.space.dense_configuration.levels, "held_out", 3000))
    assert {m.name: round(m.value, 3) for m in found} == {"damage_cosine_held_out": 0.0, "spearman_held_out": 0.867}
