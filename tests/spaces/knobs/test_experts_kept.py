"""Experts removed: the set that stays is the best one, and what stays does what it did."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.evaluators.samples import sampled
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import Knob, make_knob, swap
from autoeff.spaces.material import Material, dense_weight
from autoeff.spaces.sites import Site, find_structure
from autoeff.spaces.space import SpaceSpec

TOKENS = torch.randint(2, 61, (2, 24), generator=torch.Generator().manual_seed(0))
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


@torch.no_grad()
def material_of(model: Any, knob: Knob, site: Site) -> Material:
    weights = {item.name: dense_weight(model.get_parameter(item.weight).data, item) for item in site.linears}
    with sampled(model, {site: knob.needs}) as samples:
        model(TOKENS)
    return Material(weights, statistics=samples())


def mixture_of(model: Any, site: Site, hidden: Tensor, kept: Tensor) -> Tensor:
    """Token by token in float64, from the stacked weights and a router that knows the kept experts alone."""
    mixture = model.get_submodule(site.name)
    stacked = {name.rpartition(".")[2]: p.double() for name, p in mixture.experts.named_parameters()}
    normalises = getattr(mixture.gate, "norm_topk_prob", True)
    given = []
    for token in hidden.double():
        shares = torch.softmax(mixture.gate.weight.double()[kept] @ token, 0)
        best = shares.topk(mixture.gate.top_k)
        weights = best.values / best.values.sum() if normalises else best.values
        total = torch.zeros_like(token)
        for place, weight in zip(kept[best.indices].tolist(), weights, strict=True):
            gate, up = (stacked["gate_up_proj"][place] @ token).chunk(2)
            total += weight * (stacked["down_proj"][place] @ (torch.nn.functional.silu(gate) * up))
        given.append(total)
    return torch.stack(given)


def routed(model: Any, site: Site, hidden: Tensor) -> Tensor:
    """What the experts give, without a shared one."""
    mixture = model.get_submodule(site.name)
    _, shares, places = mixture.gate(hidden)
    return mixture.experts(hidden, places, shares)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_set_stays_and_the_router_knows_no_other(tiny_model: Callable[..., Any], family: str) -> None:
    model, knob = tiny_model(family), make_knob("experts_kept", {})
    dense = model(TOKENS).logits
    sites = knob.sites(find_structure(model))
    assert [site.block for site in sites] == ([0, 2] if family == "qwen2_moe" else [0, 1, 2])
    site = sites[0]
    assert knob.levels(site) == (4, 3, 2)
    material = material_of(model, knob, site)
    hidden = next(tensor for name, tensor in material.statistics.items() if name.endswith("inputs"))
    assert len(hidden) == TOKENS.numel()
    whole = mixture_of(model, site, hidden, torch.arange(4))
    knob.apply_built(model, site, 4, {})
    for level in (3, 2):
        kept = knob.build(site, level, material)["experts"]
        sets = {
            each: (mixture_of(model, site, hidden, torch.tensor(each)) - whole).norm(dim=1).sum() for each in combinations(range(4), level)
        }
        assert tuple(kept.tolist()) == min(sets, key=lambda each: float(sets[each]))
        changed = knob.transform(site, level, {"experts": kept}, material)
        undo_values = swap(model, {item.weight: changed.parameter(item) for item in site.linears})
        undo = knob.apply_built(model, site, level, {"experts": kept})
        torch.testing.assert_close(routed(model, site, hidden), mixture_of(model, site, hidden, kept).float(), rtol=1e-4, atol=1e-5)
        both = make_knob("experts", {}).apply(model, site, 1)
        assert model.get_submodule(site.name).gate(hidden)[2].shape[1] == 1
        both()
        assert not torch.equal(model(TOKENS).logits, dense)
        undo()
        undo_values()
        assert torch.equal(model(TOKENS).logits, dense)


@torch.no_grad()
def test_where_sets_are_many_experts_leave_one_by_one(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("mixtral", num_local_experts=6)
    knob = make_knob("experts_kept", {"sets": 10, "shares": (0.5,)})
    site = knob.sites(find_structure(model))[1]
    material = material_of(model, knob, site)
    hidden = next(tensor for name, tensor in material.statistics.items() if name.endswith("inputs"))
    whole = mixture_of(model, site, hidden, torch.arange(6))

    def loss(each: list[int]) -> float:
        return float((mixture_of(model, site, hidden, torch.tensor(each)) - whole).norm(dim=1).sum())

    stays = list(range(6))
    while len(stays) > 3:
        stays = min(([other for other in stays if other != one] for one in stays), key=loss)
    assert knob.build(site, 3, material)["experts"].tolist() == stays


def test_bytes_fall_by_those_of_the_experts_and_what_is_left_is_packed(tiny_model: Callable[..., Any]) -> None:
    structure = find_structure(tiny_model("mixtral"))
    each, name = 3 * 32 * 40, "model.layers.1.mlp"
    for batch, read, fewer in ((1, 2, 2), (2, 4, 3), (64, 4, 3)):
        space, _ = build_space(structure.at_batch(batch), SpaceSpec({"experts_kept": {}, "bits": {"group_size": 8}, "experts": {}}))
        costs = CostModel(space, batch=batch, context=64)

        def change(levels: dict[str, Any], measure: str, costs: CostModel = costs) -> float:
            return float(costs.dense(measure) - costs.exact(measure, costs.space.indices(levels)))

        three = {f"{name}:experts_kept": 3}
        assert change(three, "linear_bytes") == change(three, "weight_bytes") == 2 * each
        assert change(three, "flops_per_token") == 0
        assert change(three, "bytes_per_token") == 2 * each * (read - fewer) / batch
        packed = {f"{name}.experts.gate_up_proj+down_proj:bits": 4}
        whole = change(packed, "linear_bytes")
        assert change(packed, "bytes_per_token") == whole * read / 4 / batch
        assert change({**three, **packed}, "linear_bytes") == 2 * each + whole * 3 / 4
        assert change({**three, **packed}, "bytes_per_token") == pytest.approx((2 * each * (read - fewer) + whole * fewer / 4) / batch)
        one = {f"{name}:experts": 1}
        assert change(one, "bytes_per_token") == 2 * each * (read - min(4, batch)) / batch


def test_at_least_as_many_stay_as_a_token_is_sent_to(tiny_model: Callable[..., Any]) -> None:
    structure = find_structure(tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=3))
    assert {make_knob("experts_kept", {}).levels(site) for site in structure.sites if site.kind == "ffn"} == {(8, 6, 4, 3)}


@torch.no_grad()
def test_other_mixtures_and_settings_are_refused(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("mixtral", hidden_act="gelu"), make_knob("experts_kept", {})
    site = knob.sites(find_structure(model))[0]
    with pytest.raises(InputError, match=r"cannot understand model\.layers\.0\.mlp: its experts and router give something else"):
        knob.build(site, 2, material_of(model, knob, site))
    with pytest.raises(InputError, match="finds nothing to decide about in this llama model"):
        build_space(find_structure(tiny_model("llama")), SpaceSpec({"experts_kept": {}}))
    with pytest.raises(InputError, match=r"experts_kept\.shares must fall between 1 and 0: got 0\.5, 0\.75"):
        make_knob("experts_kept", {"shares": "0.5,0.75"})
    with pytest.raises(InputError, match=r"experts_kept\.sets must be at least 1: got 0"):
        make_knob("experts_kept", {"sets": "0"})
