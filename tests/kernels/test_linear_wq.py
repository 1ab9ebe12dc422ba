"""The low-bit linear against float64 on the same packed weight.

Limits, as the relative Frobenius error (and twice that for the worst row): a 16-bit number is off by at most u = 2^-11 (fp16) or 2^-8
(bf16), about u / sqrt(3) on average. The result is rounded once, a weight at most three times (its scale or minimum, the product, the sum),
independently, so the mean error stays below 2 u / sqrt(3) = 5.6e-4 or 4.5e-3; the limits 1e-3 and 6e-3 leave the rest to chance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import dequantize_wq, tuned
from autoeff.kernels.dequantize_wq import PLANES
from autoeff.kernels.linear_wq import CpuWeight, Weight, flops, launch, linear, moved_bytes, reference

BITS = list(PLANES)
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
GEMV: dict[str, Any] = {"kernel": "gemv", "block_n": 4, "block_k": 128, "warps": 4}
LEFT: dict[str, Any] = {"kernel": "left", "block_n": 32, "block_m": 16, "block_k": 64, "splits": 1, "warps": 4, "stages": 2}


def _weight(n: int, k: int, bits: int, group: int, symmetric: bool = False, seed: int = 0) -> Weight:
    """Codes over their range, minima near the lower end of a group as a quantiser leaves them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, -(-k // group))
    scale = (torch.rand(shape, generator=generator) * 0.1 + 0.01).half()
    minimum = (scale.float() * (0.5 - 2.0 ** (bits - 1)) + torch.randn(shape, generator=generator) * 0.05).half()
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    return Weight(dequantize_wq.pack(codes, bits), scale, None if symmetric else minimum, bits, k, group)


def _input(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _bias(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype)


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k", "group"), [(1, 9, 341, 16), (17, 33, 64, 24), (3, 1, 8, 8)])
def test_decoded_weight_gives_the_exact_product(m: int, n: int, k: int, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight, x, bias = _weight(n, k, bits, group, symmetric), _input(m, k, dtype), _bias(n, dtype)
    _assert_near(linear(x, weight, bias), reference(x, weight, bias), LIMIT[dtype])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group"), [(1, 192, 448, 64), (1, 64, 256, 256), (5, 33, 100, 32), (2, 17, 200, 96), (3, 16, 160, 128)]
)
def test_packed_cpu_kernel_gives_the_exact_product(m: int, n: int, k: int, group: int, bits: int, symmetric: bool) -> None:
    weight, x, bias = _weight(n, k, bits, group, symmetric), _input(m, k, torch.bfloat16), _bias(n, torch.bfloat16)
    packed = CpuWeight(weight)
    _assert_near(linear(x, packed, bias), reference(x, weight, bias), LIMIT[torch.bfloat16])
    _assert_near(packed(x), reference(x, weight), LIMIT[torch.bfloat16])


@pytest.mark.parametrize("bits", BITS)
def test_packed_cpu_kernel_rounds_as_it_says(bits: int) -> None:
    """Weight by weight: bfloat16 moves a number by at most 2^-8 of itself; the scale's part grows with the distance from the centre.

    The minimum of 2 bits is -1.5 scales, that of the kernel's 4-bit fields would be 6.5: without centring this fails.
    """
    weight = _weight(64, 256, bits, 64)
    assert weight.minimum is not None
    step, minimum = (table.double().repeat_interleave(64, 1).T for table in (weight.scale, weight.minimum))
    exact, centre = reference(torch.eye(256), weight), minimum + 2.0 ** (bits - 1) * step
    if bits <= 4:
        moved = (exact - centre).abs() + centre.abs()
    else:  # high and low field apart, at most 16 steps in opposite directions; the centre in two numbers
        moved = (exact - centre).abs() + 16 * step + 2.0**-8 * (centre + 8 * step).abs()
    away = (CpuWeight(weight)(torch.eye(256).bfloat16()).double() - exact).abs()
    assert bool((away <= 2.0**-8 * 1.01 * (moved + exact.abs())).all())  # 1.01: rounding is of what was rounded already


def test_strided_activations_are_taken() -> None:
    weight, x = _weight(32, 64, 4, 32), _input(3, 128, torch.bfloat16)[:, ::2]
    for found in (linear(x, weight), linear(x, CpuWeight(weight))):
        _assert_near(found, reference(x, weight), LIMIT[torch.bfloat16])


def test_leading_dimensions_are_kept() -> None:
    weight, x = _weight(32, 64, 4, 32), _input(6, 64, torch.bfloat16).view(2, 3, 64)
    exact = reference(x, weight).view(6, 32)
    for found in (linear(x, weight), linear(x, CpuWeight(weight))):
        assert found.shape == (2, 3, 32)
        _assert_near(found.reshape(6, 32), exact, LIMIT[torch.bfloat16])


def test_packed_cpu_weight_has_the_bytes_it_says() -> None:
    assert [CpuWeight(_weight(64, 256, bits, 256, True)).nbytes for bits in BITS] == [
        64 * (256 * halves // 2 + 4 * halves) for halves in (1, 1, 1, 2, 2)
    ]


def test_bytes_and_operations_are_those_of_the_tensors() -> None:
    weight, x = _weight(33, 100, 3, 32), _input(5, 100, torch.float16)
    assert weight.minimum is not None
    stored = [*weight.planes.values(), weight.scale, weight.minimum, x, linear(x, weight)]
    assert moved_bytes(5, 33, 100, 3, 32, False) == sum(tensor.nbytes for tensor in stored)
    assert flops(5, 33, 100) == 2 * 5 * 33 * 100


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.ones(1, 63).half(), None, r"x must be float16 or bfloat16 \[..., 64\] on cpu: got torch.float16 \(1, 63\)"),
        (torch.ones(1, 64), None, "x must be float16 or bfloat16 .* got torch.float32"),
        (torch.ones(1, 64).half(), torch.ones(3).half(), r"bias must be torch.float16 \(8,\) on cpu: got torch.float16 \(3,\)"),
        (torch.ones(1, 64).half(), torch.ones(8), "bias must be torch.float16 .* got torch.float32"),
    ],
)
def test_operands_that_do_not_belong_together_are_refused(x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(x, _weight(8, 64, 4, 32), bias)


def test_packed_cpu_kernel_refuses_what_it_would_have_to_round() -> None:
    packed = CpuWeight(_weight(16, 64, 4, 32))
    with pytest.raises(ValueError, match=r"x must be bfloat16 \[..., 64\]: got torch.float16"):
        packed(torch.ones(1, 64).half())
    with pytest.raises(ValueError, match="a group that is a multiple of 32: got 24"):
        CpuWeight(_weight(16, 64, 4, 24))


def test_output_of_another_shape_and_too_many_rows_are_refused() -> None:
    weight, x = _weight(8, 64, 4, 32), _input(5, 64, torch.float16)
    with pytest.raises(ValueError, match=r"y must be contiguous torch.float16 \(5, 8\)"):
        launch(x, weight, None, torch.empty(5, 9).half(), GEMV)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="gemv takes at most 4 rows: got 5"):
        launch(x, weight, None, torch.empty(5, 8).half(), GEMV)
    with pytest.raises(ValueError, match="left needs a group that is a multiple of 16: got 8"):
        launch(x, _weight(8, 64, 4, 8), None, torch.empty(5, 8).half(), LEFT)


@pytest.mark.interpreted
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "config"),
    [
        (1, 5, 341, 16, GEMV),  # rows that are not whole units
        (2, 3, 64, 24, {**GEMV, "block_n": 2}),
        (3, 9, 130, 64, {**GEMV, "block_n": 8}),
        (4, 1, 128, 1024, GEMV),
        (17, 33, 100, 32, LEFT),
        (3, 34, 200, 48, {**LEFT, "block_k": 32, "splits": 3}),  # 13 steps of 16 in 3 parts
        (1, 8, 64, 64, {**LEFT, "splits": 4}),  # parts without a step
    ],
)
def test_interpreted_kernel_gives_the_exact_product(
    m: int, n: int, k: int, group: int, config: dict[str, Any], bits: int, symmetric: bool
) -> None:
    weight, x, bias = _weight(n, k, bits, group, symmetric), _input(m, k, torch.float16), _bias(n, torch.float16)
    y = torch.full((m, n), torch.nan, dtype=torch.float16)
    launch(x, weight, bias, y, config)
    _assert_near(y, reference(x, weight, bias), LIMIT[torch.float16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 3, 4, 16, 17, 64, 130])
@pytest.mark.parametrize(("n", "k", "group"), [(1024, 4096, 64), (130, 1000, 32), (63, 341, 16)])
def test_kernel_gives_the_exact_product(cuda: torch.device, n: int, k: int, group: int, m: int, bits: int, dtype: torch.dtype) -> None:
    weight, x, bias = _weight(n, k, bits, group), _input(m, k, dtype), _bias(n, dtype)
    assert weight.minimum is not None
    planes = {name: plane.to(cuda) for name, plane in weight.planes.items()}
    moved = Weight(planes, weight.scale.to(cuda), weight.minimum.to(cuda), bits, k, group)
    exact = reference(x, weight, bias)
    _assert_near(linear(x.to(cuda), moved, bias.to(cuda)), exact, LIMIT[dtype])
    config = tuned.nearest("linear_wq", m, n, k, cuda)
    if config["kernel"] != "dequantize":
        runs = []
        for _ in range(2):
            y = torch.full((m, n), torch.nan, dtype=dtype, device=cuda)
            launch(x.to(cuda), moved, bias.to(cuda), y, config)
            runs.append(y)
        _assert_near(runs[0], exact, LIMIT[dtype])
        assert torch.equal(*runs)


def test_every_regime_has_a_default_configuration() -> None:
    cpu = torch.device("cpu")
    found = {m: tuned.nearest("linear_wq", m, 4096, 4096, cpu)["kernel"] for m in (1, 4, 5, 16, 128, 129, 4096)}
    assert found == {1: "gemv", 4: "gemv", 5: "left", 16: "left", 128: "left", 129: "dequantize", 4096: "dequantize"}
