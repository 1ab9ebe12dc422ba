"""Blocks left out or gone through twice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.forward import Forward
from autoeff.evaluators.recipe import cache_from
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.search.allocators.dp import solve
from autoeff.search.limits import parse_limit
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import make_knob
from autoeff.spaces.sites import Structure, find_structure
from autoeff.spaces.space import SpaceSpec

TOKENS = torch.randint(2, 61, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_without_any_pass_head_and_norm_see_the_embeddings(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama"), make_knob("passes", {})
    dense = model(TOKENS).logits
    undos = [knob.apply(model, site, 0) for site in knob.sites(find_structure(model).with_blocks())]
    assert len(undos) == 3
    expected = model.lm_head(model.model.norm(model.model.embed_tokens(TOKENS)))
    assert torch.equal(model(TOKENS).logits, expected)
    for undo in undos:
        undo()
    assert torch.equal(model(TOKENS).logits, dense)


@torch.no_grad()
def test_two_passes_are_those_of_a_model_with_the_block_twice(tiny_model: Callable[..., Any], every_family: str) -> None:
    model, knob = tiny_model(every_family), make_knob("passes", {})
    structure = find_structure(model).with_blocks()
    dense, site = model(TOKENS)[0], knob.sites(structure)[1]
    blocks = model.get_submodule(site.name.rpartition(".")[0])
    undo = knob.apply(model, site, 2)
    found = model(TOKENS)[0]
    undo()
    assert torch.equal(model(TOKENS)[0], dense)
    handle = blocks[1].register_forward_hook(
        lambda block, args, kwargs, result: type(block).forward(
            block,
            result[0] if isinstance(result, tuple) else result,
            *args[1:],
            **{k: v for k, v in kwargs.items() if k != "hidden_states"},
        ),
        with_kwargs=True,
    )
    assert not torch.equal(found, dense)
    assert torch.equal(found, model(TOKENS, **({"use_cache": False} if every_family not in ("bert", "roberta") else {}))[0])
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "falcon", "mixtral"])
def test_each_pass_has_keys_and_values_of_its_own(tiny_model: Callable[..., Any], family: str) -> None:
    model, knob = tiny_model(family), make_knob("passes", {})
    site = knob.sites(find_structure(model).with_blocks())[1]
    undo = knob.apply(model, site, 2)
    whole = model(TOKENS, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in TOKENS.split([10, 1, 13], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    undo()


@torch.no_grad()
def test_models_that_are_entered_midway_compute_the_same(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama"), make_knob("passes", {})
    structure = find_structure(model).with_blocks()
    forward = Forward(model, structure.blocks, 1)

    def run(kept: Any, changed: int) -> Any:
        return forward.run(TOKENS, None, slice(0, 2), [kept], [changed])

    _, dense = run(None, 0)
    for block in (0, 1, 2):
        undo = knob.apply(model, knob.sites(structure)[block], 2)
        before = forward.computed_blocks
        reused, states = run(dense, block)
        assert forward.computed_blocks - before == 3 - block
        anew, _ = run(None, 0)
        assert torch.equal(reused, anew)
        again, _ = run(states, 2)
        assert torch.equal(again, anew)
        undo()
    assert torch.equal(run(None, 0)[0], run(dense, 2)[0])


def structure_of(model: Any) -> Structure:
    return coupled(model, find_structure(model))[0].with_blocks()


def test_costs_of_what_a_block_holds_count_its_passes(tiny_model: Callable[..., Any]) -> None:
    structure = structure_of(tiny_model("llama"))
    names = {site.name: site for site in structure.sites}
    space, _ = build_space(
        structure,
        SpaceSpec({"passes": {}, "width": {"criterion": "magnitude"}, "heads": {"criterion": "magnitude"}, "bits": {"group_size": 8}}),
    )
    costs, block = CostModel(space, batch=1, context=16), "model.layers.1"
    weights = names[block].parameters

    def change(measure: str, **levels: Any) -> float:
        keys = {f"{block}:passes": levels.get("passes", 1), f"{block}.mlp:width": levels.get("width", 1)}
        keys |= {f"{block}.self_attn:heads": levels.get("heads", 1), f"{block}.mlp.down_proj:bits": levels.get("bits", 16)}
        return float(costs.exact(measure, space.indices(keys)) - costs.dense(measure))

    kept = 16 * names[f"{block}.self_attn"].kv_bytes
    assert [change("flops_per_token", passes=p) for p in (0, 1, 2)] == [-2 * weights, 0, 2 * weights]
    assert [change("weight_bytes", passes=p) for p in (0, 1, 2)] == [-2 * weights, 0, 0]
    assert [change("kv_bytes", passes=p) for p in (0, 1, 2)] == [-kept, 0, kept]
    assert [change("bytes_per_token", passes=p) for p in (0, 1, 2)] == [-2 * weights - kept, 0, 2 * weights + kept]
    for levels in ({"width": 0.5}, {"heads": 0.5}, {"bits": 4}):
        for measure in ("flops_per_token", "kv_bytes", "bytes_per_token"):
            looped = change(measure, passes=2, **levels) - change(measure, passes=2)
            assert looped == 2 * change(measure, **levels)
        assert change("weight_bytes", passes=2, **levels) == change("weight_bytes", **levels)
        assert change("weight_bytes", passes=0, **levels) == change("weight_bytes", passes=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_additive_optimum_knows_levels_that_cost_more(tiny_model: Callable[..., Any], seed: int) -> None:
    space, _ = build_space(structure_of(tiny_model("llama")), SpaceSpec({"passes": {}}))
    costs, rng = CostModel(space, batch=1, context=16), random.Random(seed)
    damage = [[0.0, rng.uniform(-1, 0.2), rng.uniform(0, 1)] for _ in space.decisions]
    for text in ("flops_per_token<=0.7x", "flops_per_token<=1x", "bytes_per_token<=1.3x"):
        limit = parse_limit(text, costs)
        kept = [x for x in product(range(3), repeat=3) if costs.exact(limit.name, x) <= limit.bound]
        best = min(kept, key=lambda x: sum(row[i] for row, i in zip(damage, x, strict=True)))
        assert solve(space, damage, costs, [limit]) == best


def test_what_cannot_be_decided_beside_it_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"passes\.most must be 1 or 2: got 3"):
        make_knob("passes", {"most": "3"})
    assert make_knob("passes", {"most": "1"}).levels(structure_of(tiny_model("llama")).sites[0]) == (1, 0)
    with pytest.raises(InputError, match="knob passes cannot be searched together with skip"):
        build_space(structure_of(tiny_model("llama")), SpaceSpec({"passes": {}, "skip": {}}))


def test_exports_come_back_with_their_passes(tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path) -> None:
    knobs = SpaceSpec({"passes": {}, "bits": {"group_size": 16}})
    setup = EvaluationSetup(
        str(tiny_models["llama"]), TextSpec(str(tiny_text), windows=4, length=16), None, knobs, 0, "cpu", str(tmp_path / "bank")
    )
    evaluator = Evaluator(setup)
    levels = {
        "model.layers.0:passes": 2,
        "model.layers.2:passes": 0,
        "model.layers.1.mlp.down_proj:bits": 4,
        "model.layers.2.mlp.down_proj:bits": 2,
    }
    levels = dict(evaluator.space.configuration(levels).levels)
    assert levels["model.layers.2.mlp.down_proj:bits"] == 16  # a block without passes has no bits
    expected = evaluator.evaluate(EvaluationRequest(levels, "search", 4))[0].value
    assert sum(evaluator.stored_bytes(levels).values()) == evaluator.space.primary(evaluator.space.indices(levels))["linear_bytes"]
    evaluator.export(levels, tmp_path / "out")
    assert Evaluator(setup).remeasure(tmp_path / "out", "search", 4, levels)[0].value == pytest.approx(expected, rel=1e-4)
    (tmp_path / "out" / "recipe.json").write_text(json.dumps({"knobs": dict(knobs.knobs), "configuration": levels, "context": 64}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(2, 150, (1, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        cache = cache_from(tmp_path / "out" / "recipe.json", model)
        said = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        evaluator.candidate.set(evaluator.space.indices(levels))
        assert torch.equal(said, evaluator.model.generate(ids, use_cache=False, max_new_tokens=6, do_sample=False))
