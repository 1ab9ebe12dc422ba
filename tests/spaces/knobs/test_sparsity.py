"""Pruned linears: what is stored, what is left for the bits, and which settings are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoeff.errors import InputError
from autoeff.spaces.knob import make_knob
from autoeff.spaces.knobs.bits import Bits
from autoeff.spaces.knobs.sparsity import Sparsity
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Linear, Site


def site_of(n: int, k: int) -> Site:
    return Site("block.linear", "linears", 0, (Linear("block.linear", k, n, False),))


def material_of(n: int, k: int) -> Material:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    weight = torch.randn(n, k, generator=generator).half()
    return Material({"block.linear": weight}, statistics={"block.linear.input_norm": torch.rand(k, generator=generator) + 0.1})


@given(n=st.integers(1, 5), k=st.integers(1, 90), ratio=st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]), bits=st.sampled_from([2, 3, 4, 6, 8]))
def test_what_is_stored_has_the_bytes_of_both_costs_and_the_values_of_both_knobs(n: int, k: int, ratio: float, bits: int) -> None:
    """Sparse codes: the mask of the one, the codes of the other, each with its exact cost on top of what is there."""
    sparse, quantized, site, material = Sparsity(ratios=(ratio,)), Bits(group_size=8), site_of(n, k), material_of(n, k)
    stored = sparse.build(site, ratio, material)
    pruned = sparse.transform(site, ratio, stored, material)
    assert sparse.cost(site, ratio) == {"linear_bytes": sum(t.nbytes for t in stored.values()) - 2 * n * k}
    mask = pruned.masks["block.linear"]
    kept = max(1, round(k * (1 - ratio)))
    assert mask.sum(1).tolist() == [kept] * n
    assert torch.equal(pruned.weights["block.linear"], material.weights["block.linear"] * mask)
    left = sparse.left(site, ratio)
    codes = quantized.build(left, bits, pruned)
    assert quantized.cost(left, bits) == {"linear_bytes": sum(t.nbytes for t in codes.values()) - 2 * n * kept}
    values = quantized.transform(left, bits, codes, pruned).weights["block.linear"]
    assert (values[~mask] == 0).all()
    assert (values - pruned.weights["block.linear"])[mask].abs().max() <= material.weights["block.linear"].abs().max() * 2


def test_pruning_costs_a_bit_of_mask_a_weight() -> None:
    assert Sparsity().cost(site_of(10, 64), 0.5) == {"linear_bytes": 10 * 8 - 2 * 10 * 32}
    assert Sparsity(pattern="2:4").cost(site_of(10, 64), "2:4") == {"linear_bytes": 10 * 8 - 2 * 10 * 32}


def test_a_pattern_keeps_its_share_of_every_run() -> None:
    knob, site, material = Sparsity(pattern="2:4"), site_of(6, 64), material_of(6, 64)
    mask = knob.transform(site, "2:4", knob.build(site, "2:4", material), material).masks["block.linear"]
    assert (mask.view(6, 16, 4).sum(2) == 2).all()


def test_sites_whose_inputs_do_not_fit_the_pattern_are_not_pruned() -> None:
    assert Sparsity(pattern="2:4").levels(site_of(6, 62)) == (0,)
    assert Sparsity(pattern="2:4").levels(site_of(6, 64)) == (0, "2:4")


def test_shares_that_save_no_bytes_are_left_out() -> None:
    assert Sparsity(ratios=(0.01, 0.5)).levels(site_of(3, 64)) == (0, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "magic"}, "unknown criterion 'magic'; known: magnitude, nirvana, sparsegpt, wanda"),
        ({"pattern": "half"}, "sparsity.pattern must be unstructured or N:M such as 2:4: got 'half'"),
        ({"pattern": "4:4"}, "sparsity.pattern '4:4' prunes nothing"),
        ({"ratios": "0.5,0.25"}, "sparsity.ratios must rise between 0 and 1: got 0.5, 0.25"),
        ({"ratios": "0.5,1"}, "sparsity.ratios must rise between 0 and 1"),
        ({"ratios": "half"}, "sparsity.ratios must be of type list of float: got 'half'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_knob("sparsity", settings)
