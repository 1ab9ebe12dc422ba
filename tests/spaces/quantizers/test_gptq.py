"""GPTQ against rounding on the same grid, from which it differs by what inputs know of one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoeff.spaces.quantizer import make_quantizer


def _inputs(k: int, seed: int = 0) -> Tensor:
    """Correlated inputs of unequal size, [tokens, K]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, k, generator=generator) / 8**0.5
    common, own = torch.randn(3 * k, 8, generator=generator), torch.randn(3 * k, k, generator=generator)
    return (common @ mixing + 0.3 * own) * torch.rand(k, generator=generator).mul(2).exp()


def _weight(n: int, k: int) -> Tensor:
    return (0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(1))).half()


def _back(name: str, weight: Tensor, bits: int, hessian: Tensor, symmetric: bool = False, mask: Tensor | None = None) -> Tensor:
    quantizer = make_quantizer(name, group_size=64, symmetric=symmetric)
    packed = quantizer.quantize(weight, bits, mask, {"hessian": hessian})
    return quantizer.dequantize(packed, bits, weight.shape[1], mask=mask)


def _output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ (weight.double() - other.double()).T).square().sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1e-8, 1e6])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uncorrelated_inputs_give_the_nearest_values_of_the_half_quadratic_grid(bits: int, factor: float, symmetric: bool) -> None:
    weight, hessian = _weight(9, 341), factor * torch.eye(341)
    plain, found = (make_quantizer(name, group_size=64, symmetric=symmetric) for name in ("hqq", "gptq"))
    packed, expected = found.quantize(weight, bits, None, {"hessian": hessian}), plain.quantize(weight, bits)
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], expected[name]) for name in packed)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("k", [64, 341])
def test_outputs_of_correlated_inputs_lose_less(k: int, bits: int, symmetric: bool) -> None:
    weight, inputs = _weight(24, k), _inputs(k)
    hessian = inputs.T @ inputs / len(inputs)
    nearest, found = (_output_error(weight, _back(name, weight, bits, hessian, symmetric), inputs) for name in ("hqq", "gptq"))
    assert found < 0.5 * nearest
    masked = _weight(24, k).abs().argsort(1) < k // 2
    pruned = weight.masked_fill(~masked, 0.0)
    nearest, found = (_output_error(pruned, _back(name, pruned, bits, hessian, symmetric, masked), inputs) for name in ("hqq", "gptq"))
    assert found < 0.7 * nearest


def test_every_value_is_on_the_half_quadratic_grid_with_the_groups_where_they_were() -> None:
    inputs, weight = _inputs(200), _weight(6, 200)
    plain, found = (make_quantizer(name, group_size=64, symmetric=False) for name in ("hqq", "gptq"))
    expected, packed = plain.quantize(weight, 3), found.quantize(weight, 3, None, {"hessian": inputs.T @ inputs})
    assert torch.equal(expected["scale"], packed["scale"])
    assert torch.equal(expected["minimum"], packed["minimum"])
    assert not torch.equal(expected["plane2"], packed["plane2"])


def test_columns_go_by_falling_activity() -> None:
    """Of two alike inputs the more active one is rounded to nearest, and the other one makes good its error."""
    weight = torch.tensor([[0.0, 0.35, 0.45, 1.0, 0.0, 0.0, 0.0, 0.0]])
    hessian = torch.eye(8)
    hessian[2, 2], hessian[1, 1], hessian[1, 2], hessian[2, 1] = 4.0, 1.0, 1.99, 1.99  # x_2 is about 2 x_1
    quantizer = make_quantizer("gptq", group_size=8, symmetric=False)
    found = quantizer.codes(weight, 2, None, {"hessian": hessian}).codes[0].tolist()
    assert found == [0, 2, 1, 3, 0, 0, 0, 0]  # 0.45 -> 1/3, which is 0.117 short; 0.35 + 2 * 0.117 = 0.58 -> 2/3


def test_dead_inputs_are_rounded_to_nearest_and_nothing_else_changes() -> None:
    inputs, weight = _inputs(96), _weight(12, 96)
    dead = torch.tensor([3, 4, 50])
    inputs[:, dead] = 0
    hessian = inputs.T @ inputs
    found, nearest = _back("gptq", weight, 3, hessian), _back("hqq", weight, 3, hessian)
    assert torch.equal(found[:, dead], nearest[:, dead])
    assert _output_error(weight, found, inputs) < 0.5 * _output_error(weight, nearest, inputs)
    assert torch.equal(_back("gptq", weight, 3, torch.zeros(96, 96)), nearest)


def test_one_row_and_one_input() -> None:
    for n, k in ((1, 9), (5, 1), (1, 1)):
        weight = _weight(n, k)
        assert _back("gptq", weight, 4, _inputs(k).T @ _inputs(k)).shape == (n, k)
