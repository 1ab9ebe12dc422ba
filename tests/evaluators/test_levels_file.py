"""What no weights hold comes back from the file beside an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.levels_file import FILE
from autoeff.evaluators.recipe import cache_from, put_in_force
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.spaces.space import SpaceSpec

PROMPT = "the dog sat on the mat and the cat ate the hat while all the others went there"


@torch.no_grad()
def test_experts_that_stayed_are_known_to_a_model_that_transformers_loads(
    setup_of: Callable[..., EvaluationSetup], tiny_model: Callable[..., Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    knobs: dict[str, dict[str, Any]] = {"experts_kept": {}, "experts": {}, "bits": {"group_size": 8}}
    tiny_model("mixtral", vocab_size=160).half().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_models["llama"]).save_pretrained(tmp_path / "model")
    setup = replace(setup_of("llama", knobs), model=str(tmp_path / "model"), space=SpaceSpec(knobs), batch=2)
    evaluator = Evaluator(setup)
    levels = {f"model.layers.{i}.mlp:experts_kept": kept for i, kept in enumerate((2, 3, 4))} | {"model.layers.1.mlp:experts": 1}
    levels = dict(evaluator.space.configuration(levels).levels)
    expected = evaluator.complete(levels, PROMPT, 12)
    ids = evaluator._texts["search"].passages.inputs[:1]
    logits = evaluator.model(ids).logits
    out = tmp_path / "out"
    evaluator.export(levels, out)
    (out / "recipe.json").write_text(json.dumps({"knobs": knobs, "configuration": levels, "context": 64}))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    alone = model(ids).logits
    assert not torch.allclose(alone, logits, atol=1e-3)  # tokens are sent to the zeros
    for _ in range(2):
        assert put_in_force(out / "recipe.json", model) == 64
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
    tokens = AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt")
    said = model.generate(**tokens, past_key_values=cache_from(out / "recipe.json", model), max_new_tokens=12, do_sample=False)
    assert AutoTokenizer.from_pretrained(out).decode(said[0], skip_special_tokens=True) == expected
    put_in_force({"knobs": {}, "configuration": {}, "context": 64}, model)
    assert torch.equal(model(ids).logits, alone)
    changed = {"knobs": knobs, "configuration": levels | {"model.layers.2.mlp:experts_kept": 2}, "context": 64}
    (out / "other.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"levels\.safetensors holds nothing for model\.layers\.2\.mlp:experts_kept"):
        put_in_force(out / "other.json", model)
    (out / FILE).unlink()
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp:experts_kept needs what was found for it: cannot read .*levels"):
        put_in_force(out / "recipe.json", model)
