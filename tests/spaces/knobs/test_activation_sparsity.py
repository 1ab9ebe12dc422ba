"""Skipped channels: those that the formulas name, as many as the level says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from autoeff.errors import InputError
from autoeff.evaluators.samples import sampled
from autoeff.kernels import ffn_sparse
from autoeff.spaces.activations import activation_of
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import Knob, make_knob
from autoeff.spaces.material import Material, dense_weight
from autoeff.spaces.sites import Site, find_structure
from autoeff.spaces.space import SpaceSpec

TOKENS = torch.randint(2, 61, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def built_for(model: Any, knob: Knob, site: Site, level: float, columns: Tensor | None = None) -> dict[str, Tensor]:
    weights = {item.name: dense_weight(model.get_parameter(item.weight).data, item) for item in site.linears}
    with sampled(model, {site: knob.needs}) as samples:
        model(TOKENS)
    material = Material(weights, statistics=samples())
    if columns is not None:
        material = material.cut({}, {site.linears[-1].name: columns})
    return knob.build(site, level, material)


def mlp_of(model: Any, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down in float64."""
    mlp = model.get_submodule(site.name)
    gate, up, down = (module.weight.double() for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return gate, up, down


@torch.no_grad()
@pytest.mark.parametrize("level", [0.3, 0.7])
def test_chess_skips_by_a_threshold_of_each_channel(tiny_model: Callable[..., Any], level: float) -> None:
    model, knob = tiny_model("llama"), make_knob("activation_sparsity", {})
    site = knob.sites(find_structure(model))[1]
    fed: list[Tensor] = []
    module = model.get_submodule(site.name)
    handle = module.register_forward_pre_hook(lambda _, given: fed.append(given[0]))
    model(TOKENS)
    handle.remove()
    x = fed[0].flatten(0, 1)
    gate, up, down = mlp_of(model, site)
    activation, beside = silu(x.double() @ gate.T), (x.double() @ up.T).abs().mean(0)
    scores = (activation.abs() * beside).flatten()
    threshold = scores.sort().values[int(level * len(scores)) - 1]
    built = built_for(model, knob, site, level)
    torch.testing.assert_close(built["thresholds"], (threshold / beside).float(), rtol=1e-4, atol=1e-7)
    before, undo = module(x), knob.apply_built(model, site, level, built)
    kept = silu(module.gate_proj(x)).abs() > built["thresholds"]  # in float32, as the model does it
    assert float(kept.double().mean()) == pytest.approx(1 - level, abs=2 / kept.numel())
    torch.testing.assert_close(module(x), ((activation * kept * (x.double() @ up.T)) @ down.T).float(), rtol=1e-3, atol=1e-4)
    undo()
    assert torch.equal(module(x), before)


@torch.no_grad()
def test_magnitude_gives_what_the_kernel_gives(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama"), make_knob("activation_sparsity", {"method": "magnitude"})
    site = knob.sites(find_structure(model))[0]
    gate, up, down = mlp_of(model, site)
    packed = ffn_sparse.pack(*(weight.half() for weight in (gate, up, down)))
    built = built_for(model, knob, site, 0.5)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)).half()
    undo = knob.apply_built(model, site, 0.5, built)
    expected = ffn_sparse.reference(x, packed, (0.0, float(built["thresholds"])))
    torch.testing.assert_close(model.get_submodule(site.name)(x.float()).double(), expected, rtol=2e-2, atol=2e-2)
    undo()
    assert knob.kernel(site, 0.5) == "ffn_sparse"
    for family, changes in (("llama", {"hidden_act": "gelu"}), ("opt", {})):
        other = knob.sites(find_structure(tiny_model(family, **changes)))[0]
        assert knob.kernel(other, 0.5) is None
    assert make_knob("activation_sparsity", {}).kernel(site, 0.5) is None


@torch.no_grad()
def test_statistical_top_k_keeps_as_many_of_normal_numbers_as_it_says(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama", intermediate_size=4096), make_knob("activation_sparsity", {"method": "top_k", "shares": (0.92,)})
    site = knob.sites(find_structure(model))[0]
    assert not knob.applies_built
    undo = knob.apply_built(model, site, 0.92, {})
    gates = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 3 + 1
    activation = activation_of(model, site)
    kept = (activation(gates) != 0).sum(1).double()
    assert float(kept.mean()) == pytest.approx(0.08 * 4096, abs=5)
    undo()
    assert torch.equal(activation(gates), silu(gates))


def test_every_family_has_an_activation_function_of_its_own_in_each_block(tiny_model: Callable[..., Any], every_family: str) -> None:
    model = tiny_model(every_family)
    sites = make_knob("activation_sparsity", {}).sites(find_structure(model))
    assert len(sites) == {"mixtral": 0, "qwen3_moe": 0, "olmoe": 0, "qwen2_moe": 1}.get(every_family, 3)
    assert len({id(activation_of(model, site)) for site in sites}) == len(sites)
    for site in sites:
        with torch.no_grad():
            dense = model(TOKENS)[0]
            for method in ("chess", "top_k"):
                knob = make_knob("activation_sparsity", {"method": method})
                undo = knob.apply_built(model, site, 0.7, built_for(model, knob, site, 0.7))  # a ReLU gives half zeros by itself
                assert not torch.equal(model(TOKENS)[0], dense)
                undo()
                assert torch.equal(model(TOKENS)[0], dense)


def test_costs_are_means_and_say_so(tiny_model: Callable[..., Any]) -> None:
    structure, each, name = find_structure(tiny_model("llama")), 32 * 40, "model.layers.1.mlp:activation_sparsity"

    def saved(settings: dict[str, Any], measure: str, batch: int = 1, **others: Any) -> tuple[float, str]:
        space, _ = build_space(structure.at_batch(batch), SpaceSpec({"activation_sparsity": settings, **others}))
        costs = CostModel(space, batch=batch, context=8)
        indices = space.indices({name: 0.5})
        methods = {m.name: m.method for m in costs.measurements(indices)}
        assert costs.dense(measure) == CostModel(build_space(structure, SpaceSpec({"skip": {}}))[0], batch=batch, context=8).dense(measure)
        return float(costs.dense(measure) - costs.exact(measure, indices)), methods[measure]

    magnitude = {"method": "magnitude"}
    assert saved({}, "flops_per_token") == (2 * 2 * each / 2, "estimated")
    assert saved(magnitude, "flops_per_token") == (2 * each / 2, "estimated")
    assert saved({}, "bytes_per_token") == (0, "exact")
    assert saved(magnitude, "bytes_per_token") == (2 * each / 2, "estimated")
    assert saved(magnitude, "bytes_per_token", batch=3) == (2 * each / 8 / 3, "estimated")  # what all three skip
    assert saved(magnitude, "bytes_per_token", bits={"group_size": 8})[0] == 0  # codes are read by another kernel
    assert saved(magnitude, "linear_bytes") == (0, "exact")


@torch.no_grad()
def test_thresholds_of_a_narrowed_sublayer_are_those_of_what_is_left(tiny_model: Callable[..., Any]) -> None:
    model, knob = tiny_model("llama"), make_knob("activation_sparsity", {})
    site = knob.sites(find_structure(model))[0]
    kept = torch.arange(0, 40, 2)
    built = built_for(model, knob, site, 0.5, kept)["thresholds"]
    assert len(built) == 40
    assert not built[1::2].any()
    assert bool((built[kept] > 0).all())
    structure = coupled(model, find_structure(model))[0]
    width = {"criterion": "magnitude", "shares": (0.5,), "multiple": 1}
    space, _ = build_space(structure, SpaceSpec({"width": width, "activation_sparsity": {}}))
    both = {"model.layers.0.mlp:width": 0.5, "model.layers.0.mlp:activation_sparsity": 0.5}
    change = {n: v - space.dense[n] for n, v in space.primary(space.indices(both)).items() if v != space.dense[n]}
    assert change["expected_flops"] == -2 * 2 * 10 * 32


def test_wrong_settings_are_one_line() -> None:
    with pytest.raises(InputError, match=r"activation_sparsity\.method must be one of chess, magnitude, top_k: got 'least'"):
        make_knob("activation_sparsity", {"method": "least"})
    with pytest.raises(InputError, match=r"activation_sparsity\.shares must rise between 0 and 1: got 0\.5, 0\.3"):
        make_knob("activation_sparsity", {"shares": "0.5,0.3"})
