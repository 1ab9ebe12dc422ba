"""2:4 weights: the format bit by bit, and the product against float64 on the same weights.

The weights are exact, sums are float32, and the result is rounded once: the relative Frobenius error stays below half a spacing, 2^-11 in
float16 and 2^-8 in bfloat16 at the worst. The limits 1e-3 and 6e-3 leave room for sums in float32 of terms that cancel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.linear_24 import Weight, flops, launch, linear, moved_bytes, pack, packed_bytes, reference

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
LEFT: dict[str, Any] = {"kernel": "left", "block_n": 32, "block_m": 16, "block_k": 32, "splits": 1, "warps": 4, "stages": 2}


def _sparse(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Two of every four kept at random places, some of them 0 themselves."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k // 4, 4, generator=generator)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(2) < 2
    dropped = torch.rand(n, k // 4, 4, generator=generator) < 0.1
    return (weight * keep * ~dropped).reshape(n, k).to(dtype)


def _input(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


@given(n=st.integers(1, 5), fours=st.integers(1, 9), seed=st.integers(0, 999), dtype=st.sampled_from(list(LIMIT)))
@settings(deadline=None, max_examples=50)
def test_dense_undoes_pack(n: int, fours: int, seed: int, dtype: torch.dtype) -> None:
    weight = _sparse(n, 4 * fours, dtype, seed)
    packed = pack(weight)
    assert torch.equal(packed.dense(), weight)
    assert packed.values.nbytes + packed.places.nbytes == packed_bytes(n, 4 * fours)
    assert torch.equal(reference(torch.eye(4 * fours), packed), weight.double().T)


def test_format_is_the_documented_one() -> None:
    packed = pack(torch.tensor([[0, 5, 0, 6, 7, 0, 0, 0, 0, 0, 8, 9]]).half())
    assert packed.values.tolist() == [[5, 6, 7, 0, 8, 9]]
    assert packed.places.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 2 | 3 << 2]]
    single = pack(torch.tensor([[0, 0, 0, 7]]).half())  # filled up with a zero, in the order of places
    assert (single.values.tolist(), single.places.tolist()) == ([[0, 7]], [[0 | 3 << 2]])


def test_a_weight_costs_nine_sixteenths() -> None:
    assert packed_bytes(3, 64) * 16 == 9 * 2 * 3 * 64
    weight, (x, _) = pack(_sparse(33, 100, torch.float16)), _input(5, 33, 100, torch.float16)
    assert moved_bytes(5, 33, 100) == sum(tensor.nbytes for tensor in (weight.values, weight.places, x, linear(x, weight)))
    assert flops(5, 33, 100) == 2 * 5 * 33 * 100


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 4), (3, 63, 340), (130, 17, 64)])
def test_product_is_the_exact_one(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    weight, (x, bias) = pack(_sparse(n, k, dtype)), _input(m, n, k, dtype)
    _assert_near(linear(x, weight, bias), reference(x, weight, bias), LIMIT[dtype])
    assert linear(x.view(1, m, k), weight).shape == (1, m, n)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[0, 1, 0, 0, 1, 2, 0, 3]]).half(), r"not 2:4: row 0 keeps 3 of the weights 4 .. 7; at most 2 are allowed"),
        (torch.zeros(2, 6).half(), r"must be float16 or bfloat16 \[N, multiple of 4\]: got torch.float16 \(2, 6\)"),
        (torch.zeros(2, 8), "must be float16 or bfloat16 .* got torch.float32"),
    ],
)
def test_weights_that_are_not_2_of_4_are_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(weight)


def test_operands_that_do_not_belong_together_are_refused() -> None:
    weight = pack(_sparse(8, 16, torch.float16))
    with pytest.raises(ValueError, match=r"x must be torch.float16 \[..., 16\] on cpu: got torch.bfloat16"):
        linear(torch.ones(1, 16).bfloat16(), weight)
    with pytest.raises(ValueError, match=r"bias must be torch.float16 \(8,\) on cpu: got torch.float16 \(7,\)"):
        linear(torch.ones(1, 16).half(), weight, torch.ones(7).half())
    with pytest.raises(ValueError, match=r"places must be contiguous torch.uint8 \(8, 2\) on cpu: got torch.uint8 \(8, 3\)"):
        Weight(weight.values, torch.zeros(8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"y must be contiguous torch.float16 \(1, 8\)"):
        launch(torch.ones(1, 16).half(), weight, None, torch.empty(2, 8).half(), LEFT)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [(1, 1, 4, LEFT), (17, 33, 100, LEFT), (3, 40, 148, {**LEFT, "splits": 3}), (2, 8, 32, {**LEFT, "block_k": 16, "splits": 4})],
)
def test_interpreted_kernel_gives_the_exact_product(m: int, n: int, k: int, config: dict[str, Any]) -> None:
    weight, (x, bias) = pack(_sparse(n, k, torch.float16)), _input(m, n, k, torch.float16)
    y = torch.full((m, n), torch.nan, dtype=torch.float16)
    launch(x, weight, bias, y, config)
    _assert_near(y, reference(x, weight, bias), LIMIT[torch.float16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("m", [1, 3, 17, 64, 130])
@pytest.mark.parametrize(("n", "k"), [(1024, 4096), (63, 340), (130, 1000)])
def test_kernel_gives_the_exact_product(cuda: torch.device, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    weight, (x, bias) = pack(_sparse(n, k, dtype)), _input(m, n, k, dtype)
    exact, moved = reference(x, weight, bias), Weight(weight.values.to(cuda), weight.places.to(cuda))
    _assert_near(linear(x.to(cuda), moved, bias.to(cuda)), exact, LIMIT[dtype])
    config = tuned.nearest("linear_24", m, n, k, cuda)
    if config["kernel"] == "left":
        y = torch.full((m, n), torch.nan, dtype=dtype, device=cuda)
        launch(x.to(cuda), moved, bias.to(cuda), y, config)
        _assert_near(y, exact, LIMIT[dtype])
