"""Fewer experts for a token: exact with all of them, and otherwise what the router's best ones say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import make_knob
from autoeff.spaces.sites import find_structure
from autoeff.spaces.space import SpaceSpec

TOKENS = torch.randint(2, 61, (2, 24), generator=torch.Generator().manual_seed(0))
FAMILIES = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": False, "olmoe": False}
"""Whether weights of the chosen experts are made to add up to 1."""


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_levels_go_down_to_one_expert_and_are_undone(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    dense, knob = model(TOKENS).logits, make_knob("experts", {})
    sites = knob.sites(find_structure(model))
    assert [site.block for site in sites] == ([0, 2] if family == "qwen2_moe" else [0, 1, 2])
    for site in sites:
        assert knob.levels(site) == (2, 1)
        knob.apply(model, site, 2)
        assert torch.equal(model(TOKENS).logits, dense)
        undo = knob.apply(model, site, 1)
        assert not torch.equal(model(TOKENS).logits, dense)
        undo()
        assert torch.equal(model(TOKENS).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_the_best_one_with_the_weight_that_the_model_gives_it(tiny_model: Callable[..., Any], family: str) -> None:
    """Expert by expert, from the stacked weights."""
    model = tiny_model(family)
    site = make_knob("experts", {}).sites(find_structure(model))[0]
    mixture = model.get_submodule(site.name)
    stacked = {name.rpartition(".")[2]: p for name, p in mixture.experts.named_parameters()}
    undo = make_knob("experts", {}).apply(model, site, 1)
    hidden = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(1))

    def expert(i: int, token: Tensor) -> Tensor:
        gate, up = (stacked["gate_up_proj"][i] @ token).chunk(2)
        return stacked["down_proj"][i] @ (torch.nn.functional.silu(gate) * up)

    expected = []
    for token in hidden[0]:
        weights = torch.softmax(mixture.gate.weight @ token, 0)
        best = int(weights.argmax())
        expected.append(expert(best, token) * (1.0 if FAMILIES[family] else weights[best]))
    found = mixture(hidden)[0]
    if hasattr(mixture, "shared_expert"):
        found = found - (torch.sigmoid(mixture.shared_expert_gate(hidden)) * mixture.shared_expert(hidden))[0]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    undo()


def test_costs_are_the_operations_of_the_experts_left_out(tiny_model: Callable[..., Any]) -> None:
    structure = find_structure(tiny_model("mixtral"))
    space, _ = build_space(structure, SpaceSpec({"experts": {}, "bits": {"group_size": 8}, "skip": {}}))
    costs = CostModel(space, batch=1, context=64)
    each = 3 * 32 * 40  # gate, up and down of an expert
    one = space.indices({"model.layers.1.mlp:experts": 1})
    assert costs.dense("flops_per_token") - costs.exact("flops_per_token", one) == 2 * each
    assert costs.dense("bytes_per_token") - costs.exact("bytes_per_token", one) == 2 * each  # one expert less is read
    assert costs.dense("linear_bytes") == costs.exact("linear_bytes", one)
    both = space.indices({"model.layers.1.mlp:experts": 1, "model.layers.1.mlp:skip": "skip"})
    alone = space.indices({"model.layers.1.mlp:skip": "skip"})
    assert costs.exact("flops_per_token", both) == costs.exact("flops_per_token", alone)
    assert "experts=1" in space.uniform
    bits = {d.key: d for d in space.decisions}["model.layers.1.mlp.experts.gate_up_proj+down_proj:bits"]
    assert all(len(context) == 2 for context in bits.costs)  # fewer experts are fewer bytes to read


def test_models_without_experts_are_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="knob experts finds nothing to decide about in this llama model"):
        build_space(find_structure(tiny_model("llama")), SpaceSpec({"experts": {}}))
