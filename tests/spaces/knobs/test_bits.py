from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.spaces.knob import make_knob, swap
from autoeff.spaces.knobs.bits import Bits
from autoeff.spaces.material import Material
from autoeff.spaces.quantizer import make_quantizer
from autoeff.spaces.sites import Linear, Site, Structure, find_structure

MakeModel = Callable[..., nn.Module]


def _site(*shapes: tuple[int, int], transposed: bool = False) -> Site:
    linears = tuple(Linear(f"block.linear{i}", k, n, False, transposed) for i, (n, k) in enumerate(shapes))
    return Site("block.linears", "linears", 0, linears)


def _weights(site: Site) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {linear.name: torch.randn(linear.out_features, linear.in_features, generator=generator).half() for linear in site.linears}


def _parameters(knob: Bits, site: Site, level: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    material = Material(weights)
    changed = knob.transform(site, level, knob.build(site, level, material), material)
    return {linear.weight: changed.parameter(linear) for linear in site.linears}


@pytest.mark.parametrize("settings", [{}, {"group_size": 8}, {"group_size": 1024, "symmetric": True}, {"group_size": 32}])
@pytest.mark.parametrize("shapes", [[(4, 64)], [(3, 63), (5, 63)], [(2, 341)], [(1, 1)], [(7, 4)]])
def test_cost_is_the_bytes_of_the_packed_tensors_against_sixteen_bits(settings: dict[str, object], shapes: list[tuple[int, int]]) -> None:
    knob, site = Bits(**settings), _site(*shapes)
    weights = _weights(site)
    dense = sum(weight.nbytes for weight in weights.values())
    for level in knob.levels(site)[1:]:
        packed = knob.build(site, level, Material(weights))
        assert knob.cost(site, level) == {"linear_bytes": sum(tensor.nbytes for tensor in packed.values()) - dense}


def test_bytes_count_scales_minima_and_whole_bytes_of_each_plane() -> None:
    site = _site((10, 70))  # 70 inputs: 18 bytes of two bits and 9 of one, two groups of 64
    assert Bits().cost(site, 3) == {"linear_bytes": 10 * (18 + 9 + 2 * 4) - 2 * 700}
    assert Bits(symmetric=True).cost(site, 3) == {"linear_bytes": 10 * (18 + 9 + 2 * 2) - 2 * 700}


@pytest.mark.parametrize(
    ("k", "levels"),
    [
        (64, (16, 8, 6, 4, 3, 2)),
        (8, (16, 8, 6, 4, 3, 2)),
        (4, (16, 6, 4, 3, 2)),  # 8 bytes dense; 8 bits are 4 bytes a row and 4 of scale and minimum
        (2, (16,)),
        (1, (16,)),
    ],
)
def test_levels_that_save_no_bytes_are_left_out(k: int, levels: tuple[int, ...]) -> None:
    assert Bits().levels(_site((5, k))) == levels


def test_sites_are_the_linears(make_structure: Callable[..., Structure]) -> None:
    structure = make_structure(2)
    assert {site.kind for site in Bits().sites(structure)} == {"linears"}
    assert [linear for site in Bits().sites(structure) for linear in site.linears] == list(structure.linears)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_decoded_weights_are_those_of_the_quantizer_in_the_layout_of_the_module(
    transposed: bool, symmetric: bool, dtype: torch.dtype
) -> None:
    knob, site = Bits(group_size=16, symmetric=symmetric), _site((6, 40), (9, 40), transposed=transposed)
    weights = {name: weight.to(dtype) for name, weight in _weights(site).items()}
    quantizer = make_quantizer("rtn", group_size=16, symmetric=symmetric)
    for level in knob.levels(site)[1:]:
        assert {name.rpartition(".")[0] for name in knob.build(site, level, Material(weights))} == set(weights)
        decoded = _parameters(knob, site, level, weights)
        for name, weight in weights.items():
            expected = quantizer.dequantize(quantizer.quantize(weight, level), level, 40, dtype)
            found = decoded.pop(f"{name}.weight")
            assert found.is_contiguous()
            assert found.dtype == dtype
            assert torch.equal(found.T if transposed else found, expected)
        assert not decoded


def test_linears_whose_names_begin_alike_are_kept_apart() -> None:
    site = Site("b", "linears", 0, tuple(Linear(f"b.l{i}", 16, n, False) for i, n in ((1, 3), (10, 5))))
    knob = Bits(group_size=8)
    decoded = _parameters(knob, site, 4, _weights(site))
    assert {name: tuple(tensor.shape) for name, tensor in decoded.items()} == {"b.l1.weight": (3, 16), "b.l10.weight": (5, 16)}


def test_applied_model_computes_with_the_decoded_weights(family: str, tiny_model: MakeModel) -> None:
    model, twin = tiny_model(family), tiny_model(family)
    knob, quantizer = Bits(group_size=8), make_quantizer("rtn", group_size=8, symmetric=False)
    for site in knob.sites(find_structure(model)):
        weights = {}
        for linear in site.linears:
            stored = twin.get_submodule(linear.name).weight.detach()
            weights[linear.name] = (stored.T if linear.transposed else stored).half()
            values = quantizer.dequantize(quantizer.quantize(weights[linear.name], 4), 4, linear.in_features)
            stored.copy_(values.T if linear.transposed else values)
        swap(model, _parameters(knob, site, 4, weights))
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], twin(tokens)[0])
        assert not torch.equal(model(tokens)[0], tiny_model(family)(tokens)[0])


def test_values_are_put_in_without_a_copy_where_the_dtype_agrees() -> None:
    model = nn.Module()
    model.linear = nn.Linear(16, 4, bias=False, dtype=torch.float16)
    site = Site("linear", "linears", 0, (Linear("linear", 16, 4, False),))
    knob = Bits(group_size=8)
    decoded = _parameters(knob, site, 4, {"linear": model.linear.weight.detach()})
    swap(model, decoded)
    assert model.linear.weight.data_ptr() == decoded["linear.weight"].data_ptr()


def test_bfloat16_weights_can_be_built() -> None:
    site = _site((4, 64))
    weights = {name: weight.bfloat16() for name, weight in _weights(site).items()}
    decoded = _parameters(Bits(), site, 8, weights)
    assert torch.allclose(decoded["block.linear0.weight"].float(), weights["block.linear0"].float(), atol=0.02)


def test_levels_below_sixteen_are_served_by_a_kernel() -> None:
    site = _site((4, 64))
    assert {level: Bits().kernel(site, level) for level in (16, 4)} == {16: None, 4: "linear_wq"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 12}, "group_size must be a multiple of 8 from 8 to 1024: got 12"),
        ({"group_size": "2048"}, "group_size must be a multiple of 8 from 8 to 1024: got 2048"),
        ({"quantizer": "magic"}, "unknown quantizer 'magic'; known: .*rtn"),
        ({"symmetric": "perhaps"}, "bits.symmetric must be of type bool: got 'perhaps'"),
        ({"groupsize": 8}, "unknown setting bits.groupsize; known: quantizer, group_size, symmetric"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_knob("bits", settings)


def test_a_nested_store_keeps_one_entry_for_every_width() -> None:
    knob, site = Bits(store="nested", group_size=32), _site((6, 64), (9, 64))
    weights = _weights(site)
    entries = {level: knob.build(site, knob.stored_level(site, level), Material(weights)) for level in knob.levels(site)[1:]}
    assert {knob.stored_level(site, level) for level in entries} == {8}
    dense = sum(weight.nbytes for weight in weights.values())
    for level, entry in entries.items():
        served = knob.derived(site, level, entry)
        assert knob.cost(site, level) == Bits(group_size=32).cost(site, level)
        assert knob.cost(site, level)["linear_bytes"] == sum(tensor.nbytes for tensor in served.values()) - dense
        values = knob.transform(site, level, served, Material(weights)).weights
        for name, weight in weights.items():
            assert 0 < float((values[name] - weight).abs().max()) < 2 * float(weight.abs().max()) / 2**level


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"store": "both"}, "bits.store must be separate or nested: got 'both'"),
        ({"store": "nested", "quantizer": "gptq"}, "bits.store nested is not for gptq, which fits every width on its own; allowed: rtn"),
    ],
)
def test_wrong_stores_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bits(**settings)
