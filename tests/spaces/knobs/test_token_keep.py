"""Tokens that go on: those that the class token attends to, text by text as without any padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import Undo, make_knob
from autoeff.spaces.sites import find_structure
from autoeff.spaces.space import SpaceSpec
from autoeff.spaces.thinned_tokens import remaining

TOKENS = torch.randint(2, 61, (3, 20), generator=torch.Generator().manual_seed(0))
LENGTHS = (20, 11, 3)


def put(model: Any, shares: dict[int, float]) -> list[Undo]:
    knob = make_knob("token_keep", {})
    sites = {site.block: site for site in knob.sites(find_structure(model).with_blocks())}
    return [knob.apply(model, sites[block], share) for block, share in shares.items()]


@torch.no_grad()
def one_by_one(model: Any, layers: Any, attentions: list[Any], hidden: Tensor, shares: dict[int, float]) -> Tensor:
    """One text [1, n, H], block by block; the attention weights are those that eager attention returns."""
    n, seen = hidden.shape[1], []
    for index, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
        if index in shares:
            kept, before = ceil(round(shares[index] * (n - 1), 9)), hidden.shape[1]
            if kept + 2 < before:
                weights = seen[-1][0].mean(0)[0]
                best = sorted(range(1, before), key=lambda i: -float(weights[i]))
                stays, gone = sorted(best[:kept]), best[kept:]
                share = weights[gone] / weights[gone].sum()
                hidden = torch.cat([hidden[:, :1], hidden[:, stays], (share @ hidden[0, gone])[None, None]], 1)
        handle = attention.register_forward_hook(lambda _, given, result: seen.append(result[1]))
        hidden = layer(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        handle.remove()
    return hidden


@torch.no_grad()
@pytest.mark.parametrize("shares", [{1: 0.5}, {2: 0.7}, {1: 0.7, 2: 0.5}, {1: 0.5, 2: 0.9}])
def test_texts_keep_what_they_keep_without_padding(tiny_model: Callable[..., Any], shares: dict[int, float]) -> None:
    model, eager = tiny_model("bert"), tiny_model("bert")
    eager.set_attn_implementation("eager")
    mask = (torch.arange(20) < torch.tensor(LENGTHS)[:, None]).long()
    dense = model(TOKENS, attention_mask=mask).last_hidden_state
    undos = put(model, shares)
    found = model(TOKENS, attention_mask=mask).last_hidden_state
    left = remaining(model, mask)
    layers = eager.encoder.layer
    for row, n in enumerate(LENGTHS):
        expected = one_by_one(
            eager, layers, [layer.attention.self for layer in layers], eager.embeddings(TOKENS[row : row + 1, :n]), shares
        )
        assert int(left[row].sum()) == expected.shape[1]
        torch.testing.assert_close(found[row, : expected.shape[1]], expected[0], rtol=1e-4, atol=1e-5)
    for undo in reversed(undos):
        undo()
    assert torch.equal(model(TOKENS, attention_mask=mask).last_hidden_state, dense)
    assert remaining(model, mask) is mask


@torch.no_grad()
def test_images_keep_what_the_class_token_sees(tiny_vit: Path) -> None:
    model, eager = (AutoModelForImageClassification.from_pretrained(tiny_vit, dtype=torch.float32).eval() for _ in range(2))
    eager.set_attn_implementation("eager")
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dense = model(images).logits
    undos = put(model, {1: 0.5})
    found = model.vit(images).last_hidden_state
    assert not torch.equal(model(images).logits, dense)
    layers = find_structure(eager).blocks
    modules = [eager.get_submodule(path) for path in layers]
    for row in range(2):
        hidden = eager.vit.embeddings(images[row : row + 1])
        expected = eager.vit.layernorm(one_by_one(eager, modules, [m.attention for m in modules], hidden, {1: 0.5}))
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    undos[0]()
    assert torch.equal(model(images).logits, dense)


def test_candidates_are_the_same_wherever_a_pass_begins(
    tiny_models: dict[str, Path], tiny_vit: Path, tiny_images: Path, tiny_text: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the cat sat on the mat and the dog"[: 4 + i] for i in range(20)) + "\n")
    knobs = SpaceSpec({"token_keep": {"shares": (0.7, 0.5)}, "bits": {"group_size": 16}})
    for model, source in ((tiny_models["bert"], text), (tiny_vit, tiny_images)):
        setup = EvaluationSetup(str(model), TextSpec(str(source), windows=4), None, knobs, 0, "cpu", str(tmp_path / "bank"))
        evaluator = Evaluator(setup)
        first, second = sorted({d.site for d in evaluator.space.decisions if d.knob == "token_keep"})
        chosen = [
            {f"{first}:token_keep": 0.5},
            {f"{second}:token_keep": 0.5},
            {f"{first}:token_keep": 0.7, f"{second}:token_keep": 0.5},
            {},
        ]

        def value(levels: dict[str, Any], evaluator: Evaluator = evaluator) -> float:
            return evaluator.evaluate(EvaluationRequest(levels, "search", 4))[0].value

        values = [value(levels) for levels in chosen]
        assert values[3] == 0.0
        assert min(values[:3]) > 0.0
        for order in ((2, 1, 0, 3), (1, 2, 3, 0)):
            assert [value(chosen[i]) for i in order] == [values[i] for i in order]
        evaluator._forward.stride = None  # no block state is kept
        evaluator._dense_states, evaluator._last_states = {}, {}
        assert [value(levels) for levels in chosen] == values
        levels = dict(evaluator.space.configuration(chosen[2]).levels)
        evaluator.export(levels, tmp_path / model.name)
        found = Evaluator(replace(setup)).remeasure(tmp_path / model.name, "search", 4, levels)
        assert found[0].value == pytest.approx(values[2], rel=1e-4)


def test_costs_fall_with_the_share_of_a_block(tiny_model: Callable[..., Any]) -> None:
    structure = find_structure(tiny_model("bert")).with_blocks()
    space, _ = build_space(structure, SpaceSpec({"token_keep": {}, "skip": {}}))
    costs, weights = CostModel(space, batch=1, context=16), structure.sites[0].parameters
    assert [d.block for d in space.decisions if d.knob == "token_keep"] == [0, 1]

    def saved(levels: dict[str, Any]) -> float:
        return float(costs.dense("flops_per_token") - costs.exact("flops_per_token", space.indices(levels)))

    one, skipped = {"encoder.layer.1:token_keep": 0.5}, {"encoder.layer.1.attention:skip": "skip"}
    assert saved(one) == weights
    assert saved({**one, "encoder.layer.2:token_keep": 0.5}) == 2 * weights
    assert saved({**one, **skipped}) == weights + saved(skipped) / 2
    assert costs.exact("bytes_per_token", space.indices(one)) == costs.dense("bytes_per_token")


def test_decoders_and_wrong_settings_are_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="knob token_keep finds nothing to decide about in this llama model"):
        build_space(find_structure(tiny_model("llama")).with_blocks(), SpaceSpec({"token_keep": {}}))
    with pytest.raises(InputError, match=r"token_keep\.shares must fall between 1 and 0: got 0\.5, 0\.7"):
        make_knob("token_keep", {"shares": "0.5,0.7"})
