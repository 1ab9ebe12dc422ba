"""Block-sparse weights: the format against the dense weight, the product against float64.

Weights are exact, sums float32, the result is rounded once: below 2^-11 (fp16) and 2^-8 (bf16), with room for terms that cancel (relative
Frobenius error; twice that for the worst row); on the torch path the bias is added to the rounded product.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.linear_block_sparse import Weight, flops, launch, linear, moved_bytes, pack, packed_bytes, reference

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
CONFIG: dict[str, Any] = {"kernel": "left", "block_m": 16, "splits": 1, "warps": 4, "stages": 2}
# M, rows and columns of blocks, their size
SHAPES = [(1, 1, 1, 16, 16), (3, 4, 5, 16, 32), (17, 3, 2, 32, 16)]


def _case(m: int, rows: int, columns: int, block_n: int, block_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row of blocks is empty, one full."""
    generator = torch.Generator().manual_seed(m + rows)
    weight = torch.randn(rows * block_n, columns * block_k, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    mask[0], mask[-1] = False, True
    x, bias = torch.randn(m, columns * block_k, generator=generator), torch.randn(rows * block_n, generator=generator)
    return x.to(dtype), weight.to(dtype), mask, bias.to(dtype)


def _dense(weight: Tensor, mask: Tensor) -> Tensor:
    spread = mask.repeat_interleave(weight.shape[0] // mask.shape[0], 0).repeat_interleave(weight.shape[1] // mask.shape[1], 1)
    return weight * spread


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path_gives_the_exact_product(shape: Any, dtype: torch.dtype) -> None:
    x, weight, mask, bias = _case(*shape, dtype)
    packed = pack(weight, mask)
    exact = x.double() @ _dense(weight, mask).double().T
    torch.testing.assert_close(reference(x, packed), exact)
    _assert_near(linear(x, packed, bias), exact + bias.double(), LIMIT[dtype])
    _assert_near(linear(x[None], packed)[0], exact, LIMIT[dtype])


def test_a_weight_without_blocks_gives_the_bias() -> None:
    packed = pack(torch.ones(32, 32).half(), torch.zeros(2, 2, dtype=torch.bool))
    assert packed.density == 0
    assert torch.equal(linear(torch.ones(3, 32).half(), packed, torch.arange(32).half()), torch.arange(32).half().expand(3, 32))


def test_bytes_and_operations_are_those_of_the_tensors() -> None:
    x, weight, mask, _ = _case(*SHAPES[1], torch.float16)
    packed, blocks = pack(weight, mask), int(mask.sum())
    stored = [packed.values, packed.column, packed.start, x, linear(x, packed)]
    assert moved_bytes(3, 64, 160, blocks, 16, 32) == sum(tensor.nbytes for tensor in stored)
    assert packed_bytes(64, blocks, 16, 32) == sum(tensor.nbytes for tensor in stored[:3])
    assert flops(3, blocks, 16, 32) == 2 * 3 * blocks * 512
    assert packed.density == pytest.approx(blocks / 20)


def test_operands_that_do_not_belong_together_are_refused() -> None:
    x, weight, mask, _ = _case(*SHAPES[1], torch.float16)
    packed = pack(weight, mask)
    with pytest.raises(ValueError, match=r"x must be torch.float16 \[..., 160\] on cpu: got torch.bfloat16"):
        linear(x.bfloat16(), packed)
    with pytest.raises(ValueError, match=r"bias must be torch.float16 \(64,\)"):
        linear(x, packed, torch.ones(9).half())
    with pytest.raises(ValueError, match=r"a mask \(3, 5\) does not divide a weight \(64, 160\)"):
        pack(weight, mask[:3])
    with pytest.raises(ValueError, match="block_n must be a power of two, at least 16: got 8"):
        pack(weight, mask.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="values must be contiguous"):
        Weight(packed.values[1:], packed.column, packed.start, 160, 16, 32)
    with pytest.raises(ValueError, match="y must be contiguous"):
        launch(x, packed, None, torch.empty(3, 63).half(), CONFIG)


@pytest.mark.interpreted
@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "splits": 3}], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 2, 128, 128)], ids=str)
def test_interpreted_kernel_gives_the_exact_product(shape: Any, config: dict[str, Any]) -> None:
    x, weight, mask, bias = _case(*shape, torch.float16)
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=torch.float16)
    launch(x, pack(weight, mask), bias, y, config)
    _assert_near(y, reference(x, pack(weight, mask), bias), LIMIT[torch.float16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("m", [1, 3, 17, 64, 130, 600])
@pytest.mark.parametrize("shape", [shape[1:] for shape in SHAPES] + [(16, 32, 64, 64), (7, 9, 128, 128)], ids=str)
def test_kernel_gives_the_exact_product(cuda: torch.device, shape: Any, m: int, dtype: torch.dtype) -> None:
    x, weight, mask, bias = _case(m, *shape, dtype)
    packed = pack(weight, mask)
    exact, moved = reference(x, packed, bias), pack(weight.to(cuda), mask.to(cuda))
    _assert_near(linear(x.to(cuda), moved, bias.to(cuda)), exact, LIMIT[dtype])
    runs = []
    for _ in range(2):
        y = torch.full((m, packed.n), torch.nan, dtype=dtype, device=cuda)
        launch(x.to(cuda), moved, bias.to(cuda), y, tuned.nearest("linear_block_sparse", m, packed.n, packed.k, cuda))
        runs.append(y)
    _assert_near(runs[0], exact, LIMIT[dtype])
    assert torch.equal(*runs)
