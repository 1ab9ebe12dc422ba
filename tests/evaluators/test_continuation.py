"""Quality where caches are decided about: text generated behind a prompt, against decoding token by token."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.preparation import prepare
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup
from autoeff.spaces.kv_cache import KvCache

SetupOf = Callable[..., EvaluationSetup]
LENGTH, WINDOWS = 64, 4
CACHE: dict[str, dict[str, Any]] = {"kv_budget": {"shares": (0.5, 0.25)}, "kv_bits": {}}
ALL = {"bits": {"group_size": 16}, "skip": {}, **CACHE}


@pytest.fixture
def generated(setup_of: SetupOf) -> Callable[..., EvaluationSetup]:
    """Setups with windows of 64 tokens, which is the models' context."""

    def make(family: str, knobs: dict[str, dict[str, Any]] = ALL, **changes: Any) -> EvaluationSetup:
        setup = setup_of(family, knobs)
        return replace(setup, data=replace(setup.data, windows=WINDOWS, length=LENGTH), **changes)

    return make


def measured(evaluator: Evaluator, levels: Any, split: str = "search") -> float:
    return evaluator.evaluate(EvaluationRequest(levels, split, WINDOWS))[0].value  # type: ignore[arg-type]


@torch.no_grad()
def token_by_token(evaluator: Evaluator, ids: Tensor) -> Tensor:
    """Logits of the second half of each window, decoded one token at a time under the configuration in force."""
    cache, start = KvCache(evaluator.model, LENGTH), LENGTH // 2
    evaluator.model(ids[:, :start], past_key_values=cache)
    return torch.cat([evaluator.model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, LENGTH)], 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_kl_is_that_of_the_text_decoded_token_by_token(generated: Callable[..., EvaluationSetup], family: str, policy: str) -> None:
    knobs = {**ALL, "kv_budget": {"policy": policy, "shares": (0.5, 0.25)}}
    evaluator, rng = Evaluator(generated(family, knobs)), random.Random(0)
    ids = evaluator.preparation.passages["search"].inputs
    evaluator.candidate.set((0,) * len(evaluator.space.decisions))
    teacher = token_by_token(evaluator, ids).double().log_softmax(-1)
    for _ in range(3):
        indices = evaluator.space.sample(rng)
        found = evaluator.evaluate(EvaluationRequest(evaluator.space.at(indices).levels, "search", WINDOWS))[0]
        candidate = token_by_token(evaluator, ids).double().log_softmax(-1)
        assert found.value == pytest.approx(float((teacher.exp() * (teacher - candidate)).sum(-1).mean()), rel=1e-3, abs=1e-6)
        assert found.tokens == WINDOWS * LENGTH // 2


def test_dense_is_zero_and_values_do_not_depend_on_what_was_measured_before(generated: Callable[..., EvaluationSetup]) -> None:
    evaluator, rng = Evaluator(generated("llama")), random.Random(1)
    configurations = [evaluator.space.at(evaluator.space.sample(rng)).levels for _ in range(6)]
    values = [measured(evaluator, levels) for levels in configurations]
    assert len(set(values)) == 6
    assert measured(evaluator, {}) == measured(evaluator, {}, "held_out") == 0.0
    for i in rng.sample(range(6), 6):
        assert measured(evaluator, configurations[i]) == values[i]
    fresh = Evaluator(generated("llama"))
    fresh._forward.stride = None
    assert [measured(fresh, levels) for levels in configurations] == values


def test_every_knob_is_measured_on_the_generated_half(generated: Callable[..., EvaluationSetup]) -> None:
    """What comes before a cache level in the prompt alone is not counted: the same bits have another value without cache knobs."""
    levels = {"model.layers.0.self_attn.o_proj:bits": 2}
    with_cache, without = Evaluator(generated("llama")), Evaluator(generated("llama", {"bits": {"group_size": 16}}))
    found = with_cache.evaluate(EvaluationRequest(with_cache.space.configuration(levels).levels, "held_out", WINDOWS))
    assert [m.tokens for m in found] == [WINDOWS * LENGTH // 2, WINDOWS * (LENGTH // 2 - 1)]
    assert found[0].value != measured(without, without.space.configuration(levels).levels, "held_out")


def test_an_exported_model_with_its_recipe_measures_what_the_candidate_measured(
    generated: Callable[..., EvaluationSetup], tmp_path: Path
) -> None:
    setup = generated("llama")
    evaluator, rng = Evaluator(setup), random.Random(4)
    levels = evaluator.space.at(evaluator.space.sample(rng)).levels
    expected = measured(evaluator, levels)
    evaluator.export(levels, tmp_path / "out")
    found = Evaluator(setup).remeasure(tmp_path / "out", "search", WINDOWS, levels)
    assert found[0].value == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert Evaluator(setup).remeasure(tmp_path / "out", "search", WINDOWS)[0].value != pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_completions_are_what_generate_says_with_the_same_cache(generated: Callable[..., EvaluationSetup]) -> None:
    evaluator, rng = Evaluator(generated("llama", CACHE)), random.Random(2)
    prompt = "the dog sat on the mat and the cat ate the hat while"
    for levels in ({}, evaluator.space.at(evaluator.space.sample(rng)).levels):
        text = evaluator.complete(levels, prompt, 8)
        tokenizer = AutoTokenizer.from_pretrained(evaluator.preparation.facts.path)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = evaluator.model.generate(
            ids, past_key_values=KvCache(evaluator.model, LENGTH), max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        assert text == tokenizer.decode(said[0], skip_special_tokens=True)


@torch.no_grad()
def test_statistics_of_attention_are_those_of_the_dense_model(generated: Callable[..., EvaluationSetup]) -> None:
    evaluator = Evaluator(generated("llama", {"kv_budget": {"shares": (0.5,)}}))
    found = evaluator.statistics({"attention"}).attention
    passages = evaluator.preparation.passages["search"]
    evaluator.model.set_attn_implementation("eager")
    layers = evaluator.model(passages.inputs, output_attentions=True).attentions
    queries = 2  # a 32nd of 64
    for statistics, weights in zip(found.values(), layers, strict=True):
        received = weights.double().sum((1, 2))
        mass = (received.sort(1, descending=True).values / received.sum(1, keepdim=True)).cumsum(1).mean(0)
        assert statistics.mass == pytest.approx(mass.tolist(), rel=1e-5)
        back = weights[:, :, -queries:, :-queries].double()
        assert statistics.dispersion == pytest.approx(float(-(back * back.log()).sum((1, 2, 3)).mean()), rel=1e-5)
        mean = back.mean(2, keepdim=True)
        assert statistics.shift == pytest.approx(float((back - mean).square().mean(2).sum((1, 2)).mean()), rel=1e-4)


def test_what_budgets_are_shares_of_is_said_and_checked(generated: Callable[..., EvaluationSetup]) -> None:
    assert not any("budgets of the cache" in notice for notice in prepare(generated("llama")).notices)
    other = prepare(generated("llama", context=2048))
    assert any(
        "budgets of the cache cost what they cost at 2048 tokens, and are measured on windows of 64" in notice for notice in other.notices
    )
    assert other.space.dense["cache_bytes"] == 2048 * other.space.dense["kv_bytes_per_token"]
    with pytest.raises(InputError, match=r"0\.03 of a window of 64 tokens keeps 1, fewer than the 4"):
        prepare(generated("llama", {"kv_budget": {"shares": (0.03,)}}, context=4096))
    with pytest.raises(InputError, match="knob kv_budget finds nothing to decide about in this bert model"):
        prepare(replace(generated("bert", CACHE), data=replace(generated("bert").data, length=16)))
