"""A linear as a pair of thin ones: y = U (V x) + b, with V [R, K] and U [N, R].

It pays in bytes below R = N K / (N + K). On CUDA three regimes, chosen by `tuned.nearest` from the number of rows M:

    pair    few rows: two launches, both weights as the left operand. The first leaves float32 sums of V x, K split over programs; the
            second adds the parts in a fixed order as it reads them. One launch could not fill the chip: each program would need all of V.
    fused   a block of rows keeps V x in registers (R at most 256) and meets all or a part of U; V x never reaches memory
    dense   otherwise: two products of the library

Elsewhere two products of torch. V x is rounded to the 16-bit type once in every regime; sums are float32.

Source: the pair is any factorisation, e.g. SVD-LLM (Wang et al. 2024, arXiv:2403.07378).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from autoeff.kernels import tuned

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["MAX_RANK", "flops", "hopper_cases", "launch", "linear", "moved_bytes", "reference"]

MAX_RANK = 256
"""Of the fused kernel: its tile of 64 rows x R sums in float32 stays in registers."""


def moved_bytes(m: int, n: int, k: int, rank: int) -> int:
    """Bytes that the pair reads and writes at the least: 16-bit U, V, x and y."""
    return 2 * (rank * (n + k) + m * (n + k))


def flops(m: int, n: int, k: int, rank: int) -> int:
    """Floating-point operations of both products."""
    return 2 * m * rank * (n + k)


def reference(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """The exact result, float64 [..., N]."""
    y = x.cpu().double() @ v.cpu().double().T @ u.cpu().double().T
    return y if bias is None else y + bias.cpu().double()


def linear(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product U (V x) + b, [..., N] in the dtype of x: on CUDA by Triton where it has a regime, else by torch.

    Args:
        x: [..., K], float16, bfloat16 or, for torch alone, float32.
        v: [R, K] in the dtype of x.
        u: [N, R] in the dtype of x.
        bias: [N] in the dtype of x.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
    """
    _check(x, v, u, bias)
    rank, k = v.shape
    n = u.shape[0]
    if x.is_cuda and x.dtype != torch.float32:
        rows = x.reshape(-1, k).contiguous()
        config = tuned.nearest("linear_lowrank", rows.shape[0], n, k, x.device)
        if config["kernel"] == "pair" or (config["kernel"] == "fused" and rank <= MAX_RANK):
            y = torch.empty(rows.shape[0], n, dtype=x.dtype, device=x.device)
            launch(rows, v, u, bias, y, config)
            return y.view(*x.shape[:-1], n)
    return dense_linear(dense_linear(x, v), u, bias)


def launch(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernels, `config["kernel"]` of pair and fused, from contiguous x [M, K] into y [M, N].

    Raises:
        ValueError: As in `linear`; a strided operand; a rank above `MAX_RANK` for the fused kernel.
        RuntimeError: Triton is not installed.
    """
    _check(x, v, u, bias)
    expected = (x.shape[0], u.shape[0])
    if tuple(y.shape) != expected or y.dtype != x.dtype or not all(tensor.is_contiguous() for tensor in (x, v, u, y)):
        raise ValueError(f"x, v, u and y must be contiguous, y {x.dtype} {expected}: got {y.dtype} {tuple(y.shape)}")
    if config["kernel"] == "fused" and v.shape[0] > MAX_RANK:
        raise ValueError(f"the fused kernel takes a rank up to {MAX_RANK}: got {v.shape[0]}")
    if triton is None:
        raise RuntimeError("low-rank pairs on a GPU need Triton, which is not installed: pip install 'triton>=3.6'")
    if not y.numel():
        return
    with torch.cuda.device(y.get_device()):  # on the CPU (-1) it does nothing
        for _, kernel, grid, arguments, options in _launches(x, v, u, bias, y, config):
            kernel[grid](*arguments, **options)


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""
    for config, dtype in product(tuned.configurations("linear_lowrank"), (torch.float16, torch.bfloat16)):
        for rank in {"pair": (512,), "fused": (64, 256), "dense": ()}[config["kernel"]]:
            m, n, k = config["m"], config["n"], config["k"]
            x, v, u, y = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, k), (rank, k), (n, rank), (m, n)))
            for name, *case in _launches(x, v, u, None, y, config):
                tensor_cores = config["block_n" if config["kernel"] == "pair" else "block_m"] >= 64
                yield f"linear_lowrank {name}", f"{dtype}, rank {rank}; {tuned.label(config)}", *case, tensor_cores


def _check(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None) -> None:
    if v.dim() != 2 or u.dim() != 2 or x.shape[-1] != v.shape[1] or u.shape[1] != v.shape[0]:
        raise ValueError(
            f"x [..., K], v [R, K] and u [N, R] do not belong together: got {tuple(x.shape)}, {tuple(v.shape)}, {tuple(u.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (u.shape[0],):
        raise ValueError(f"bias must be {(u.shape[0],)}: got {tuple(bias.shape)}")
    for name, tensor in (("v", v), ("u", u), ("bias", x if bias is None else bias)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x is: got {tensor.dtype} on {tensor.device}")


def _launches(
    x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Name, kernel, grid, positional arguments and constants of each launch, in their order."""
    (m, k), (n, rank) = x.shape, u.shape
    options = {"num_warps": config["warps"], "num_stages": config["stages"]}
    blocks = {"BLOCK_N": config["block_n"], "BLOCK_M": config["block_m"], "BLOCK_K": config["block_k"]}
    last = y if bias is None else bias
    if config["kernel"] == "fused":
        grid = (triton.cdiv(m, config["block_m"]), config["splits"])
        steps = triton.cdiv(triton.cdiv(n, config["block_n"]), config["splits"])
        constants = {**blocks, "BLOCK_R": max(16, triton.next_power_of_2(rank)), "BIAS": bias is not None}
        yield "fused", _fused_kernel, grid, (x, v, u, last, y, m, n, k, rank, steps), constants | options
        return
    splits = config["splits"]
    parts = torch.empty(splits, m, rank, dtype=torch.float32, device=x.device)
    rows = triton.cdiv(m, config["block_m"])
    steps = triton.cdiv(triton.cdiv(k, config["block_k"]), splits)
    yield (
        "shrink", _left_kernel, (triton.cdiv(rank, config["block_n"]), rows, splits), (x, v, y, parts, m, rank, k, steps),
        {**blocks, "PARTS": 0, "BIAS": False} | options,
    )  # fmt: skip
    steps = triton.cdiv(rank, config["block_k"])
    yield (
        "expand", _left_kernel, (triton.cdiv(n, config["block_n"]), rows, 1), (parts, u, last, y, m, n, rank, steps),
        {**blocks, "PARTS": splits, "BIAS": bias is not None} | options | {"num_stages": 2},  # each stage holds all the float32 parts
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _left_kernel(  # type: ignore[no-untyped-def]
        x, weight, bias, y, m, n, k, steps,
        PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Y^T = W X^T; the part of K that belongs to program id 2. With PARTS, x is that many float32 summands."""
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        first = tl.program_id(2) * steps
        for number in range(first, tl.minimum(first + steps, (k + BLOCK_K - 1) // BLOCK_K)):
            column = number * BLOCK_K + tl.arange(0, BLOCK_K)
            at_w = row.to(tl.int64)[:, None] * k + column[None, :]
            left = tl.load(weight + at_w, mask=(row[:, None] < n) & (column[None, :] < k), other=0.0)
            at_x = token.to(tl.int64)[None, :] * k + column[:, None]
            inside = (column[:, None] < k) & (token[None, :] < m)
            if PARTS:
                right = tl.load(x + at_x, mask=inside, other=0.0)
                for part in tl.static_range(1, PARTS):
                    right += tl.load(x + part * tl.cast(m, tl.int64) * k + at_x, mask=inside, other=0.0)
                total = tl.dot(left, right.to(left.dtype), total)
            else:
                total = tl.dot(left, tl.load(x + at_x, mask=inside, other=0.0), total)
        if BIAS:
            total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        at_y = (tl.program_id(2).to(tl.int64) * m + token[None, :]) * n + row[:, None]
        tl.store(y + at_y, total.to(y.dtype.element_ty), mask=(row[:, None] < n) & (token[None, :] < m))

    @triton.jit
    def _fused_kernel(  # type: ignore[no-untyped-def]
        x, v, u, bias, y, m, n, k, rank, steps,
        BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = x.dtype.element_ty
        token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        direction = tl.arange(0, BLOCK_R)
        inner = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(0, k, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            at_x = token.to(tl.int64)[:, None] * k + column[None, :]
            left = tl.load(x + at_x, mask=(token[:, None] < m) & (column[None, :] < k), other=0.0)
            right = tl.load(
                v + direction[None, :] * k + column[:, None], mask=(direction[None, :] < rank) & (column[:, None] < k), other=0.0
            )
            inner = tl.dot(left, right, inner)
        narrow = inner.to(dtype)
        first = tl.program_id(1) * steps
        for number in range(first, first + steps):
            row = number * BLOCK_N + tl.arange(0, BLOCK_N)
            right = tl.load(u + row[None, :] * rank + direction[:, None], mask=(direction[:, None] < rank) & (row[None, :] < n), other=0.0)
            total = tl.dot(narrow, right)
            if BIAS:
                total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
            at_y = token.to(tl.int64)[:, None] * n + row[None, :]
            tl.store(y + at_y, total.to(dtype), mask=(token[:, None] < m) & (row[None, :] < n))
