"""Adapters beside a base weight against float64.

Limits (relative Frobenius error; twice that for the worst row): x A^T and the result are rounded once each, on the torch path the base and
the adapters' share as well, by u / sqrt(3) on average, u = 2^-11 (fp16) or 2^-8 (bf16): below 1e-3 and 6e-3; float32 below 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.linear_lora import MAX_RANK, Adapters, add, flops, launch, linear, moved_bytes, reference

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}
FUSED: dict[str, Any] = {
    "kernel": "fused", "block_n": 32, "block_m": 16, "block_k": 32, "splits": 1, "shrink_splits": 2, "warps": 4, "stages": 2,
}  # fmt: skip
# M, N, K, rank, adapter of each row in turn
SHAPES = [(1, 1, 8, 1, [0]), (3, 63, 100, 17, [2, -1, 0]), (17, 33, 64, 8, [0, 0, 3, 3, 3]), (5, 16, 40, 4, [-1])]


def _case(m: int, n: int, k: int, rank: int, pattern: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Adapters, Tensor, Tensor]:
    """Adapters as large as the base, so that a missing one is seen; the second of four has rank 1 and zeros."""
    generator = torch.Generator().manual_seed(m + n + k)
    x, weight, a, b, bias = (torch.randn(s, generator=generator) for s in ((m, k), (n, k), (4, rank, k), (4, n, rank), (n,)))
    a[1, 1:] = b[1, :, 1:] = 0
    adapters = Adapters((a / k**0.5).to(dtype), (b / rank**0.5).to(dtype), torch.tensor([0.5, 1.0, 2.0, -1.0]))
    of_row = torch.tensor([pattern[i % len(pattern)] for i in range(m)], dtype=torch.int32)
    return x.to(dtype), (weight / k**0.5).to(dtype), adapters, of_row, bias.to(dtype)


def _on(device: torch.device, adapters: Adapters) -> Adapters:
    return Adapters(adapters.a.to(device), adapters.b.to(device), adapters.scale.to(device))


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path_gives_the_exact_result(shape: Any, dtype: torch.dtype) -> None:
    x, weight, adapters, of_row, bias = _case(*shape, dtype)
    _assert_near(linear(x, weight, adapters, of_row, bias), reference(x, weight, adapters, of_row, bias), LIMIT[dtype])


def test_reference_is_the_formula() -> None:
    x, weight, adapters, of_row, _ = _case(*SHAPES[1], torch.float32)
    found = reference(x, weight, adapters, of_row)
    merged = weight.double() + 2.0 * adapters.b[2].double() @ adapters.a[2].double()
    torch.testing.assert_close(found[0], merged @ x[0].double())
    torch.testing.assert_close(found[1], weight.double() @ x[1].double())


def test_adapters_are_added_to_the_product_of_another_kernel_in_place() -> None:
    x, weight, adapters, of_row, _ = _case(*SHAPES[2], torch.float32)
    y = x @ weight.T
    assert add(y, x, adapters, of_row) is y
    _assert_near(y, reference(x, weight, adapters, of_row), LIMIT[torch.float32])


def test_bytes_and_operations_are_those_of_the_tensors() -> None:
    x, weight, adapters, of_row, _ = _case(5, 33, 100, 7, [0, 1, 2, 3], torch.float16)
    stored = [x, weight, adapters.a, adapters.b, linear(x, weight, adapters, of_row)]
    assert moved_bytes(5, 33, 100, 7, 4) == sum(tensor.nbytes for tensor in stored)
    assert flops(5, 33, 100, 7) == 2 * 5 * 33 * 100 + 2 * 5 * 7 * 100 + 2 * 5 * 33 * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 9).half()}, r"must be \(M, 8\) and \(6, 8\): got \(2, 9\), \(6, 8\)"),
        ({"weight": torch.ones(6, 8)}, "weight must be torch.float16 on cpu as x is: got torch.float32"),
        ({"of_row": torch.zeros(3, dtype=torch.int32)}, r"of_row must be torch.int32 \(2,\) on cpu: got torch.int32 \(3,\)"),
        ({"of_row": torch.zeros(2)}, "of_row must be torch.int32"),
        ({"bias": torch.ones(5).half()}, r"bias must be \(6,\): got \(5,\)"),
    ],
)
def test_operands_that_do_not_belong_together_are_refused(changes: dict[str, Tensor], message: str) -> None:
    x, weight, adapters, of_row, _ = _case(2, 6, 8, 4, [0], torch.float16)
    with pytest.raises(ValueError, match=message):
        linear(**{"x": x, "weight": weight, "adapters": adapters, "of_row": of_row, **changes})


def test_adapters_of_other_forms_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not belong together: got \(2, 4, 8\), \(2, 6, 5\), \(2,\)"):
        Adapters(torch.ones(2, 4, 8), torch.ones(2, 6, 5), torch.ones(2))
    with pytest.raises(ValueError, match="scale torch.float32"):
        Adapters(torch.ones(2, 4, 8), torch.ones(2, 6, 4), torch.ones(2).half())
    x, weight, adapters, of_row, _ = _case(2, 6, 8, MAX_RANK + 1, [0], torch.float16)
    with pytest.raises(ValueError, match="a rank up to 128: got 129"):
        launch(x, weight, adapters, of_row, None, torch.empty(2, 6).half(), FUSED)
    x, weight, adapters, of_row, _ = _case(2, 6, 8, 4, [0], torch.float16)
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(x, weight.T.contiguous().T, adapters, of_row, None, torch.empty(2, 6).half(), FUSED)


@pytest.mark.interpreted
@pytest.mark.parametrize("config", [FUSED, {**FUSED, "splits": 3, "shrink_splits": 1}], ids=["whole", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_give_the_exact_result(shape: Any, config: dict[str, Any]) -> None:
    x, weight, adapters, of_row, bias = _case(*shape, torch.float16)
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=torch.float16)
    launch(x, weight, adapters, of_row, bias, y, config)
    _assert_near(y, reference(x, weight, adapters, of_row, bias), LIMIT[torch.float16])


@pytest.mark.interpreted
def test_interpreted_kernels_add_to_another_product() -> None:
    x, weight, adapters, of_row, _ = _case(*SHAPES[2], torch.float16)
    y = x @ weight.T
    launch(x, None, adapters, of_row, None, y, FUSED)
    _assert_near(y, reference(x, weight, adapters, of_row), LIMIT[torch.float16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 3, 17, 64, 130, 600])
@pytest.mark.parametrize(("n", "k", "rank"), [(1024, 4096, 16), (63, 341, 17), (4096, 1024, 64)])
def test_kernels_give_the_exact_result(cuda: torch.device, n: int, k: int, rank: int, m: int, dtype: torch.dtype) -> None:
    x, weight, adapters, of_row, bias = _case(m, n, k, rank, [0, 2, 2, -1, 3], dtype)
    exact = reference(x, weight, adapters, of_row, bias)
    x, weight, of_row, bias, adapters = x.to(cuda), weight.to(cuda), of_row.to(cuda), bias.to(cuda), _on(cuda, adapters)
    _assert_near(linear(x, weight, adapters, of_row, bias), exact, LIMIT[dtype])
    runs = []
    for _ in range(2):
        y = torch.full((m, n), torch.nan, dtype=dtype, device=cuda)
        launch(x, weight, adapters, of_row, bias, y, tuned.nearest("linear_lora", m, n, k, cuda))
        runs.append(y)
    _assert_near(runs[0], exact, LIMIT[dtype])
    assert torch.equal(*runs)
