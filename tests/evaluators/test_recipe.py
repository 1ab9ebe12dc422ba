"""A model with a recipe's cache says what the evaluator's candidate says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.recipe import cache_from
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.spaces.kv_cache import plans_of

PROMPT = "the dog sat on the mat and the cat ate the hat while all the others went there"


@torch.no_grad()
def test_generation_with_the_cache_of_a_recipe_is_that_of_the_candidate(setup_of: Callable[..., EvaluationSetup], tmp_path: Path) -> None:
    knobs = {"kv_budget": {"shares": (0.5, 0.25), "policy": "h2o"}, "kv_bits": {}, "bits": {"group_size": 16}}
    setup = setup_of("llama", knobs)
    evaluator = Evaluator(replace(setup, data=replace(setup.data, windows=4, length=64)))
    levels = evaluator.space.at([len(d.levels) - 1 for d in evaluator.space.decisions]).levels
    evaluator.export(levels, tmp_path / "out")
    recipe = {"knobs": knobs, "configuration": dict(levels), "context": 64}
    (tmp_path / "out" / "recipe.json").write_text(json.dumps(recipe))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = evaluator.complete(levels, PROMPT, 16)
    for _ in range(2):
        cache = cache_from(tmp_path / "out" / "recipe.json", model)
        said = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))
        assert tokenizer.decode(said[0], skip_special_tokens=True) == expected
        assert all(state.tokens <= 16 for state in cache.states)
    assert [plan for _, plan in plans_of(model)] == [plan for _, plan in plans_of(evaluator.model)]
    with pytest.raises(InputError, match="decides about other.0, which this LlamaForCausalLM lacks"):
        cache_from(recipe | {"configuration": {"other.0:kv_budget": 0.5}}, model)
    with pytest.raises(InputError, match="cannot read the recipe"):
        cache_from(tmp_path / "out" / "nothing.json", model)
