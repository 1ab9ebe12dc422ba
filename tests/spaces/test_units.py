"""Units cut out of a sublayer: masked and sliced are the same, and which settings are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import make_knob, swap
from autoeff.spaces.material import Material, dense_weight
from autoeff.spaces.sites import Site, find_structure
from autoeff.spaces.units import UnitKnob

MakeModel = Callable[..., nn.Module]


def sublayer(model: nn.Module, knob: UnitKnob) -> tuple[Site, Material]:
    """The knob's second site and its linears."""
    site = knob.sites(coupled(model, find_structure(model))[0])[1]
    weights = {linear.name: dense_weight(model.get_parameter(linear.weight).detach(), linear) for linear in site.linears}
    return site, Material(weights)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_a_masked_ffn_is_the_sliced_one(tiny_model: MakeModel, share: float) -> None:
    model = tiny_model("llama").double()
    knob = make_knob("width", {"criterion": "magnitude"})
    assert isinstance(knob, UnitKnob)
    site, material = sublayer(model, knob)
    left = knob.transform(site, share, knob.build(site, share, material), material)
    assert knob.cost(site, share)["linear_bytes"] == 2 * sum(w.numel() - material.weights[name].numel() for name, w in left.weights.items())
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in knob.left(site, share).linears}
    assert {name: tuple(weight.shape) for name, weight in left.weights.items()} == shapes
    swap(model, {linear.weight: left.parameter(linear) for linear in site.linears})
    gate, up, down = (left.weights[linear.name] for linear in site.linears)
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sliced = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert torch.allclose(model.get_submodule(site.name)(x), sliced, atol=1e-12)


def test_the_units_of_greatest_score_are_kept_in_their_order(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    knob = make_knob("width", {"criterion": "magnitude", "multiple": 1})
    assert isinstance(knob, UnitKnob)
    site, material = sublayer(model, knob)
    energy = sum(weight.double().square().sum(1 if name != site.linears[-1].name else 0) for name, weight in material.weights.items())
    kept = knob.build(site, 0.5, material)["units"]
    assert kept.tolist() == sorted(energy.argsort(descending=True)[:20].tolist())


def test_kept_heads_bring_their_query_heads_and_their_cache(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")  # 4 query heads on 2 KV heads of 8
    knob = make_knob("heads", {"criterion": "magnitude"})
    assert isinstance(knob, UnitKnob)
    site, _ = sublayer(model, knob)
    assert knob.levels(site) == (1, 0.5)  # what three quarters and a quarter of two heads round up to is there already
    left = knob.left(site, 0.5)
    assert [(linear.out_features, linear.in_features) for linear in left.linears] == [(16, 32), (8, 32), (8, 32), (32, 16)]
    assert knob.cost(site, 0.5)["kv_bytes_per_token"] == -site.kv_bytes // 2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("width", {"shares": "0.5,0.75"}, "width.shares must fall between 1 and 0: got 0.5, 0.75"),
        ("heads", {"shares": "0"}, "heads.shares must fall between 1 and 0"),
        ("width", {"multiple": "0"}, "width.multiple must be at least 1: got 0"),
        (
            "width",
            {"criterion": "sparsegpt"},
            "width.criterion 'sparsegpt' gives no scores to compare units by; allowed: magnitude, nirvana, wanda",
        ),
    ],
)
def test_wrong_settings_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_knob(name, settings)
