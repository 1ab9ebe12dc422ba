"""The low-rank pair against float64.

Limits (relative Frobenius error; twice that for the worst row): V x and the result are rounded once each, by at most u = 2^-11 (fp16) or
2^-8 (bf16), on average u / sqrt(3) of themselves; errors of V x average out over R. Together below 1e-3 and 6e-3; float32 below 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.linear_lowrank import MAX_RANK, flops, launch, linear, moved_bytes, reference

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}
PAIR: dict[str, Any] = {"kernel": "pair", "block_n": 32, "block_m": 16, "block_k": 32, "splits": 3, "warps": 4, "stages": 2}
FUSED: dict[str, Any] = {"kernel": "fused", "block_n": 16, "block_m": 16, "block_k": 32, "splits": 2, "warps": 4, "stages": 2}


def _operands(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + k + rank)
    x, v, u, bias = (torch.randn(shape, generator=generator) for shape in ((m, k), (rank, k), (n, rank), (n,)))
    return x.to(dtype), (v / k**0.5).to(dtype), (u / rank**0.5).to(dtype), bias.to(dtype)


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 1, 8, 1), (3, 63, 341, 17), (130, 64, 64, 64)])
def test_pair_gives_the_exact_product(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    x, v, u, bias = _operands(m, n, k, rank, dtype)
    _assert_near(linear(x, v, u, bias), reference(x, v, u, bias), LIMIT[dtype])
    exact = x.double() @ (u.double() @ v.double()).T
    _assert_near(linear(x.view(1, m, k), v, u)[0], exact, LIMIT[dtype])


def test_bytes_and_operations_are_those_of_the_tensors() -> None:
    operands = _operands(5, 33, 100, 7, torch.float16)
    x, v, u, _ = operands
    assert moved_bytes(5, 33, 100, 7) == sum(tensor.nbytes for tensor in (x, v, u, linear(x, v, u)))
    assert flops(5, 33, 100, 7) == 2 * 5 * 7 * 100 + 2 * 5 * 33 * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.ones(4, 9).half()}, r"do not belong together: got \(2, 8\), \(4, 9\), \(6, 4\)"),
        ({"u": torch.ones(6, 5).half()}, "do not belong together"),
        ({"u": torch.ones(6, 4)}, "u must be torch.float16 on cpu as x is: got torch.float32"),
        ({"v": torch.ones(4, 8, device="meta").half()}, "v must be torch.float16 on cpu as x is: got torch.float16 on meta"),
        ({"bias": torch.ones(5).half()}, r"bias must be \(6,\): got \(5,\)"),
    ],
)
def test_operands_that_do_not_belong_together_are_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**{"x": torch.ones(2, 8).half(), "v": torch.ones(4, 8).half(), "u": torch.ones(6, 4).half(), **changes})


def test_launch_refuses_strided_operands_and_ranks_that_do_not_fit() -> None:
    x, v, u, _ = _operands(2, 6, 8, 4, torch.float16)
    y = torch.empty(2, 6).half()
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(x, v, u.T.contiguous().T, None, y, PAIR)
    x, v, u, _ = _operands(2, 6, 8, MAX_RANK + 1, torch.float16)
    with pytest.raises(ValueError, match="rank up to 256: got 257"):
        launch(x, v, u, None, y, FUSED)


@pytest.mark.interpreted
@pytest.mark.parametrize("config", [PAIR, {**PAIR, "splits": 1, "block_k": 16}, FUSED, {**FUSED, "splits": 1}], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 1, 8, 1), (3, 63, 70, 17), (17, 33, 64, 32)])
def test_interpreted_kernels_give_the_exact_product(m: int, n: int, k: int, rank: int, config: dict[str, Any]) -> None:
    x, v, u, bias = _operands(m, n, k, rank, torch.float16)
    y = torch.full((m, n), torch.nan, dtype=torch.float16)
    launch(x, v, u, bias, y, config)
    _assert_near(y, reference(x, v, u, bias), LIMIT[torch.float16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 3, 17, 64, 130, 600])
@pytest.mark.parametrize(("n", "k", "rank"), [(1024, 4096, 256), (63, 341, 17), (4096, 1024, 512)])
def test_kernels_give_the_exact_product(cuda: torch.device, n: int, k: int, rank: int, m: int, dtype: torch.dtype) -> None:
    x, v, u, bias = _operands(m, n, k, rank, dtype)
    exact = reference(x, v, u, bias)
    moved = [tensor.to(cuda) for tensor in (x, v, u, bias)]
    _assert_near(linear(*moved), exact, LIMIT[dtype])
    config = tuned.nearest("linear_lowrank", m, n, k, cuda)
    if config["kernel"] == "pair" or (config["kernel"] == "fused" and rank <= MAX_RANK):
        y = torch.full((m, n), torch.nan, dtype=dtype, device=cuda)
        launch(*moved, y, config)
        _assert_near(y, exact, LIMIT[dtype])
