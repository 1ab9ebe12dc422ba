"""The 8-bit product against float64 on the same codes.

Limits (relative Frobenius error; twice that for the worst row): integer sums are exact and only the result is rounded, below 2^-11 (fp16)
or 2^-8 (bf16); fp8 sums are float32. The interpreted kernel with a float32 result stands for the sum itself: 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.linear_w8a8 import (
    LIMITS,
    Weight,
    flops,
    launch,
    linear,
    moved_bytes,
    pack,
    packed_bytes,
    quantize,
    quantize_launch,
    reference,
)

FORMS = list(LIMITS)
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
LEFT: dict[str, Any] = {"kernel": "left", "block_n": 32, "block_m": 16, "block_k": 64, "splits": 1, "warps": 4, "stages": 2}


def _case(m: int, n: int, k: int, form: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Weight, Tensor]:
    """Tokens of very different size, one of them all zeros, and an output without weights."""
    generator = torch.Generator().manual_seed(m + n + k)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    x *= torch.exp(torch.randn(m, 1, generator=generator) * 2)
    x[m // 2], weight[n // 2] = (0, 0) if m > 1 and n > 1 else (1, 1)
    return x.to(dtype), pack(weight, form), bias.to(dtype)


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 8), (3, 63, 341), (17, 33, 64), (130, 8, 7)])
def test_torch_path_gives_the_exact_product(m: int, n: int, k: int, form: torch.dtype, dtype: torch.dtype) -> None:
    x, weight, bias = _case(m, n, k, form, dtype)
    _assert_near(linear(x, weight, bias), reference(x, weight, bias), LIMIT[dtype])
    _assert_near(linear(x.view(1, m, k), weight)[0], reference(x, weight), LIMIT[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_off_by_half_a_step_and_reach_the_limit(form: torch.dtype) -> None:
    x, _, _ = _case(9, 3, 200, form, torch.float16)
    codes, scale = quantize(x, form)
    away = (codes.double() * scale.double()[:, None] - x.double()).abs()
    if form == torch.int8:
        step = scale.double()[:, None].expand_as(away)
    else:  # three fraction bits: half a step is 2^-4 of the number, or 2^-10 scales below the normal numbers
        step = torch.maximum(x.double().abs() * 2.0**-3, scale.double()[:, None] * 2.0**-9)
    assert bool((away <= step * 0.5001).all())
    assert bool((codes[[0, 1, 2, 3, 5, 6, 7, 8]].float().abs().amax(1) == LIMITS[form]).all())
    assert not codes[4].float().any()
    assert scale[4] == 0


def test_reference_is_the_formula() -> None:
    weight = Weight(torch.tensor([[1, -2], [127, 0]], dtype=torch.int8), torch.tensor([0.5, 1.0]))
    x = torch.tensor([[127.0, 63.6]]).half()  # scale 1: codes 127 and 64
    torch.testing.assert_close(reference(x, weight, torch.ones(2).half()), torch.tensor([[0.5, 16130.0]], dtype=torch.float64))
    eighths = Weight(torch.tensor([[1.0]]).to(torch.float8_e4m3fn), torch.tensor([1.0]))
    assert float(reference(torch.tensor([[3.0]]).half(), eighths)) == pytest.approx(3.0)


def test_bytes_and_operations_are_those_of_the_tensors() -> None:
    x, weight, _ = _case(5, 33, 100, torch.int8, torch.float16)
    stored = [weight.codes, weight.scale, x, linear(x, weight)]
    assert moved_bytes(5, 33, 100) == sum(tensor.nbytes for tensor in stored)
    assert packed_bytes(33, 100) == weight.codes.nbytes + weight.scale.nbytes
    assert flops(5, 33, 100) == 2 * 5 * 33 * 100


def test_operands_that_do_not_belong_together_are_refused() -> None:
    weight = pack(torch.ones(8, 16), torch.int8)
    with pytest.raises(ValueError, match=r"x must be float16 or bfloat16 \[..., 16\] on cpu: got torch.float32"):
        linear(torch.ones(1, 16), weight)
    with pytest.raises(ValueError, match=r"bias must be torch.float16 \(8,\) on cpu: got torch.float16 \(7,\)"):
        linear(torch.ones(1, 16).half(), weight, torch.ones(7).half())
    with pytest.raises(ValueError, match=r"scale must be contiguous torch.float32 \(8,\) on cpu: got torch.float32 \(7,\)"):
        Weight(weight.codes, torch.ones(7))
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn: got torch.float32 .* and torch.uint8"):
        pack(torch.ones(8, 16), torch.uint8)
    codes, scale = quantize(torch.ones(1, 16).half(), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="codes must be contiguous torch.int8"):
        launch(codes, scale, weight, None, torch.empty(1, 8).half(), LEFT)
    with pytest.raises(ValueError, match=r"y must be contiguous float16 or bfloat16 \(1, 8\)"):
        launch(codes.to(torch.int8), scale, weight, None, torch.empty(2, 8).half(), LEFT)


@pytest.mark.interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "k"), [(1, 8), (5, 341), (3, 5000)])
def test_interpreted_quantisation_gives_the_codes_of_torch(m: int, k: int, form: torch.dtype) -> None:
    x, _, _ = _case(m, 1, k, form, torch.float16)
    x[0] = torch.arange(k) % 255 * 0.5  # ties, where the scale is 1
    x[0, -1] = LIMITS[form]
    codes, scale = torch.empty(m, k, dtype=form), torch.full((m,), torch.nan)
    quantize_launch(x, codes, scale)
    expected, scales = quantize(x, form)
    assert torch.equal(scale, scales)
    assert torch.equal(codes.float(), expected.float())


@pytest.mark.interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [(1, 1, 8, LEFT), (17, 33, 100, LEFT), (3, 40, 200, {**LEFT, "splits": 3}), (2, 8, 64, {**LEFT, "block_k": 32, "splits": 4})],
)
def test_interpreted_kernel_gives_the_exact_product(m: int, n: int, k: int, config: dict[str, Any], form: torch.dtype) -> None:
    x, weight, bias = _case(m, n, k, form, torch.float16)
    y = torch.full((m, n), torch.nan, dtype=torch.float16)
    launch(*quantize(x, form), weight, bias, y, config)
    _assert_near(y, reference(x, weight, bias), LIMIT[torch.float16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 3, 17, 64, 130, 600])
@pytest.mark.parametrize(("n", "k"), [(1024, 4096), (63, 341), (130, 1000)])
def test_kernel_gives_the_exact_product(cuda: torch.device, n: int, k: int, m: int, form: torch.dtype, dtype: torch.dtype) -> None:
    x, weight, bias = _case(m, n, k, form, dtype)
    exact, moved = reference(x, weight, bias), Weight(weight.codes.to(cuda), weight.scale.to(cuda))
    codes, scale = quantize(x.to(cuda), form)
    expected, scales = quantize(x, form)
    assert torch.equal(codes.cpu().float(), expected.float())
    assert torch.equal(scale.cpu(), scales)
    _assert_near(linear(x.to(cuda), moved, bias.to(cuda)), exact, LIMIT[dtype])
    config = tuned.nearest("linear_w8a8_int8" if form == torch.int8 else "linear_w8a8_fp8", m, n, k, cuda)
    runs = []
    for _ in range(2):
        y = torch.full((m, n), torch.nan, dtype=dtype, device=cuda)
        launch(codes, scale, moved, bias.to(cuda), y, config)
        runs.append(y)
    _assert_near(runs[0], exact, LIMIT[dtype])
    assert torch.equal(*runs)
