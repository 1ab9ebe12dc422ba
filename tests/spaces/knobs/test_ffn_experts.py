"""FFNs divided into experts: the router is the least-squares one, and what is computed is what the kernel for experts computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.evaluators.amounts import amounts
from autoeff.kernels import moe
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import Knob, make_knob
from autoeff.spaces.knobs.ffn_experts import _divided
from autoeff.spaces.material import Material, dense_weight
from autoeff.spaces.sites import Site, find_structure
from autoeff.spaces.space import SpaceSpec

TOKENS = torch.randint(2, 61, (4, 60), generator=torch.Generator().manual_seed(0))
KNOB = {"neurons": 4}
FED, INNER, EXPERTS = 32, 40, 10


@torch.no_grad()
def built_for(model: Any, knob: Knob, site: Site, columns: Tensor | None = None) -> dict[str, Tensor]:
    weights = {item.name: dense_weight(model.get_parameter(item.weight).data, item) for item in site.linears}
    with amounts(model, [site]) as statistics:
        model(TOKENS)
    material = Material(weights, statistics=statistics())
    if columns is not None:
        material = material.cut({}, {site.linears[-1].name: columns})
    return knob.build(site, 0.5, material)


@torch.no_grad()
def seen(model: Any, site: Site) -> tuple[Tensor, Tensor]:
    """What the FFN and its last linear are fed, float64 [tokens, ...]."""
    fed: list[Tensor] = []
    names = (site.linears[0].name, site.linears[-1].name)
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda _, given: fed.append(given[0])) for name in names]
    model(TOKENS)
    for handle in handles:
        handle.remove()
    return fed[0].flatten(0, 1).double(), fed[1].flatten(0, 1).double()


@torch.no_grad()
def test_the_router_is_the_ridge_regression_of_what_experts_give(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama"), make_knob("ffn_experts", KNOB)
    site = knob.sites(find_structure(model))[1]
    built = built_for(model, knob, site)
    experts, router = built["experts"], built["router"].double()
    assert experts.bincount().tolist() == [4] * EXPERTS
    x, y = seen(model, site)
    gives = y.abs() * model.get_submodule(site.linears[-1].name).weight.double().norm(dim=0)
    mass = torch.stack([gives[:, experts == e].sum(1) for e in range(EXPERTS)], 1)
    centred = x - x.mean(0)
    penalty = (0.01 * centred.square().sum() / FED).sqrt() * torch.eye(FED, dtype=torch.float64)
    targets = torch.cat([mass - mass.mean(0), torch.zeros(FED, EXPERTS, dtype=torch.float64)])
    slopes = torch.linalg.lstsq(torch.cat([centred, penalty]), targets).solution
    predicted = mass.mean(0) + centred @ slopes
    scores = x @ router[:, :-1].T + router[:, -1]
    wanted = predicted - predicted.mean(1, keepdim=True)  # what all experts have in common decides nothing
    scale = (wanted * scores).sum() / scores.square().sum()
    assert scale > 0
    torch.testing.assert_close(scores * scale, wanted, rtol=0, atol=float(2e-3 * wanted.abs().max()))


@torch.no_grad()
def test_what_is_computed_is_what_the_kernel_for_experts_gives_and_all_of_them_are_the_dense_ffn(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama"), make_knob("ffn_experts", KNOB)
    site = knob.sites(find_structure(model))[0]
    built = built_for(model, knob, site)
    mlp = model.get_submodule(site.name)
    places = built["experts"].argsort(stable=True).view(EXPERTS, 4)
    gate, up, down = (module.weight.half() for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    weights = moe.Experts(torch.cat([gate[places], up[places]], 1), down.T[places].mT.contiguous(), EXPERTS)
    x = torch.randn(24, FED, generator=torch.Generator().manual_seed(2)).half()
    router = built["router"].float()
    chosen = (x.float() @ router[:, :-1].T + router[:, -1]).topk(5, 1).indices.int()
    dense, undo = mlp(x.float()), knob.apply_built(model, site, 0.5, built)
    torch.testing.assert_close(mlp(x.float()).double(), moe.reference(x, weights, chosen, torch.ones(chosen.shape)), rtol=2e-2, atol=2e-3)
    assert not torch.equal(mlp(x.float()), dense)
    undo()
    assert torch.equal(mlp(x.float()), dense)
    undo = knob.apply_built(model, site, 0.99, built)  # rounded up to all ten
    assert torch.equal(mlp(x.float()), dense)
    undo()
    assert knob.kernel(site, 0.5) == "moe"
    assert knob.kernel(knob.sites(find_structure(tiny_model("opt")))[0], 0.5) is None


@pytest.mark.parametrize(("rows", "count"), [(40, 10), (41, 10), (7, 7), (100, 13)])
def test_parts_are_equal_and_hold_what_is_alike(rows: int, count: int) -> None:
    random = torch.Generator().manual_seed(1)
    sizes = _divided(torch.randn(rows, 6, generator=random), count).bincount(minlength=count)
    assert sizes.sum() == rows
    assert sizes.max() - sizes.min() <= 1
    centres = torch.eye(4).repeat_interleave(5, 0)[torch.randperm(20, generator=random)]
    parts = _divided(centres + 0.01 * torch.randn(20, 4, generator=random), 4)
    assert {tuple(centres[parts == part].argmax(1).unique().tolist()) for part in range(4)} == {(0,), (1,), (2,), (3,)}


def test_costs_are_those_of_the_chosen_experts_and_of_the_router(tiny_model: Callable[..., Any]) -> None:
    structure, name = find_structure(tiny_model("llama")), "model.layers.1.mlp:ffn_experts"
    router = EXPERTS * (FED + 1)

    def saved(measure: str, batch: int = 1, **others: Any) -> float:
        space, _ = build_space(structure.at_batch(batch), SpaceSpec({"ffn_experts": KNOB, **others}))
        costs = CostModel(space, batch=batch, context=8)
        assert costs.dense(measure) == CostModel(build_space(structure, SpaceSpec({"skip": {}}))[0], batch=batch, context=8).dense(measure)
        return float(costs.dense(measure) - costs.exact(measure, space.indices({name: 0.25})))

    assert saved("flops_per_token") == moe.flops(1, FED, INNER, 1) - moe.flops(1, FED, 4, 3) - 2 * router
    assert saved("weight_bytes") == -2 * router
    assert saved("linear_bytes") == 0
    assert saved("bytes_per_token") == 2 * (3 * FED * 28 - router)  # three of ten are read
    assert saved("bytes_per_token", batch=3) == 2 * (3 * FED * 4 - router) / 3  # nine at the most
    assert saved("bytes_per_token", batch=4) == -2 * router / 4
    assert saved("bytes_per_token", bits={"group_size": 8}) == -2 * router  # no kernel reads codes in this order
    few = make_knob("ffn_experts", {"neurons": 1})
    assert {few.levels(site) for site in few.sites(structure)} == {(1, 0.5, 0.25)}  # at 0.75 the router takes more than is saved
    assert not make_knob("ffn_experts", {"neurons": 40}).sites(structure)


@torch.no_grad()
def test_neurons_that_are_left_are_divided_anew(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama"), make_knob("ffn_experts", KNOB)
    structure = coupled(model, find_structure(model))[0]
    kept = torch.arange(0, INNER, 2)
    built = built_for(model, knob, knob.sites(structure)[0], kept)
    assert built["experts"][kept].bincount().tolist() == [4] * 5
    assert built["router"].shape == (5, FED + 1)
    space, _ = build_space(
        structure, SpaceSpec({"width": {"criterion": "magnitude", "shares": (0.5,), "multiple": 1}, "ffn_experts": KNOB})
    )
    narrow = {"model.layers.0.mlp:width": 0.5}
    before, after = (space.primary(space.indices({**narrow, **levels})) for levels in ({}, {"model.layers.0.mlp:ffn_experts": 0.5}))
    assert after["flops_per_token"] - before["flops_per_token"] == -2 * 3 * FED * 8 + 2 * 5 * (FED + 1)  # three of five


def test_every_family_with_dense_ffns_is_divided(tiny_model: Callable[..., Any], every_family: str) -> None:
    model, knob = tiny_model(every_family), make_knob("ffn_experts", KNOB)
    sites = knob.sites(find_structure(model))
    assert len(sites) == {"mixtral": 0, "qwen3_moe": 0, "olmoe": 0, "qwen2_moe": 1}.get(every_family, 3)
    for site in sites[:1]:
        with torch.no_grad():
            dense = model(TOKENS)[0]
            undo = knob.apply_built(model, site, 0.5, built_for(model, knob, site))
            assert not torch.equal(model(TOKENS)[0], dense)
            undo()
            assert torch.equal(model(TOKENS)[0], dense)


def test_wrong_settings_and_knobs_that_exclude_it_are_one_line(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"ffn_experts\.neurons must be at least 1: got 0"):
        make_knob("ffn_experts", {"neurons": 0})
    with pytest.raises(InputError, match=r"ffn_experts\.shares must fall between 1 and 0: got 0\.5, 0\.75"):
        make_knob("ffn_experts", {"shares": "0.5,0.75"})
    for other in ("activation_sparsity", "rank"):
        with pytest.raises(InputError, match=f"knob ffn_experts cannot be searched together with {other}"):
            build_space(find_structure(tiny_model("llama")), SpaceSpec({"ffn_experts": KNOB, other: {}}))
