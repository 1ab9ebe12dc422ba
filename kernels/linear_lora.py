"""A linear with low-rank adapters, each row with its own: y = x W^T + b + scale[l] * (x A[l]^T) B[l]^T, l the adapter of the row.

Adapters of one site are stacked, A [L, R, K] and B [L, N, R], lower ranks filled up with zeros; `of_row` [M] names the adapter of each row,
-1 for none. Any order of the rows is right; rows sorted by adapter are fast, since a tile of rows visits each adapter that it contains.

On CUDA two launches. The first leaves float32 parts of x A^T, K split over programs; the second is the base product with the weight as
the left operand, which adds the parts in a fixed order and the adapters' share before it stores. Many rows: the base is the library's, and
the second kernel adds to it; `add` does the same to any base product, e.g. of packed weights. Elsewhere torch, adapter by adapter.

x A^T is rounded to the 16-bit type once; sums are float32, also that of base and adapters.

Source: LoRA (Hu et al. 2021, arXiv:2106.09685); several adapters in one launch, Punica (Chen et al. 2023, arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

__all__ = ["MAX_RANK", "Adapters", "add", "flops", "hopper_cases", "launch", "linear", "moved_bytes", "reference"]

MAX_RANK = 128
"""Of the Triton kernels: x A^T of a tile of rows stays in registers."""


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters of one linear [N, K], checked once.

    Attributes:
        a: [L, R, K], float16, bfloat16 or, for torch alone, float32.
        b: [L, N, R] in the dtype of a.
        scale: float32 [L].

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
    """

    a: Tensor
    b: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        a, b, scale = self.a, self.b, self.scale
        if a.dim() != 3 or b.dim() != 3 or b.shape[0] != a.shape[0] or b.shape[2] != a.shape[1] or scale.shape != a.shape[:1]:
            found = f"{tuple(a.shape)}, {tuple(b.shape)}, {tuple(scale.shape)}"
            raise ValueError(f"a [L, R, K], b [L, N, R] and scale [L] do not belong together: got {found}")
        if b.dtype != a.dtype or scale.dtype != torch.float32 or not a.device == b.device == scale.device:
            raise ValueError(
                f"b must be {a.dtype}, scale torch.float32, all on {a.device}: got {b.dtype} on {b.device}, {scale.dtype} on {scale.device}"
            )

    @property
    def n(self) -> int:
        return self.b.shape[1]

    @property
    def k(self) -> int:
        return self.a.shape[2]

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def moved_bytes(m: int, n: int, k: int, rank: int, adapters: int) -> int:
    """Bytes that the operation reads and writes at the least: 16-bit W, x, y and this many adapters."""
    return 2 * (n * k + m * (n + k) + adapters * rank * (n + k))


def flops(m: int, n: int, k: int, rank: int) -> int:
    """Floating-point operations of the three products."""
    return 2 * m * (n * k + rank * (n + k))


def reference(x: Tensor, weight: Tensor, adapters: Adapters, of_row: Tensor, bias: Tensor | None = None) -> Tensor:
    """The exact result, float64 [M, N], row by row."""
    wide = x.cpu().double()
    y = wide @ weight.cpu().double().T
    for row, adapter in enumerate(of_row.tolist()):
        if adapter >= 0:
            a, b = adapters.a[adapter].cpu().double(), adapters.b[adapter].cpu().double()
            y[row] += float(adapters.scale[adapter]) * (b @ (a @ wide[row]))
    return y if bias is None else y + bias.cpu().double()


def linear(x: Tensor, weight: Tensor, adapters: Adapters, of_row: Tensor, bias: Tensor | None = None) -> Tensor:
    """The base product and the adapters' share, [M, N] in the dtype of x: on CUDA by Triton where ranks fit, else by torch.

    Args:
        x: [M, K].
        weight: [N, K] in the dtype of x.
        adapters: In the dtype of x.
        of_row: int32 [M], the adapter of each row, -1 for none.
        bias: [N] in the dtype of x.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
    """
    _check(x, weight, adapters, of_row, bias)
    if x.is_cuda and x.dtype != torch.float32 and adapters.rank <= MAX_RANK:
        x = x.contiguous()
        config = tuned.nearest("linear_lora", x.shape[0], adapters.n, adapters.k, x.device)
        if config["kernel"] == "fused":
            y = torch.empty(x.shape[0], adapters.n, dtype=x.dtype, device=x.device)
            launch(x, weight, adapters, of_row, bias, y, config)
            return y
    return add(dense_linear(x, weight, bias), x, adapters, of_row)


def add(y: Tensor, x: Tensor, adapters: Adapters, of_row: Tensor) -> Tensor:
    """The product y [M, N] of another kernel, to which the adapters' share is added in place.

    Raises:
        ValueError: As in `linear`.
    """
    _check(x, y, adapters, of_row, None, base=y)
    if x.is_cuda and x.dtype != torch.float32 and adapters.rank <= MAX_RANK and y.is_contiguous():
        config = tuned.nearest("linear_lora", max(x.shape[0], 65), adapters.n, adapters.k, x.device)
        launch(x.contiguous(), None, adapters, of_row, None, y, config)
        return y
    for adapter in sorted(set(of_row.tolist())):
        if adapter >= 0:
            rows = (of_row == adapter).nonzero()[:, 0]
            share = dense_linear(dense_linear(x[rows], adapters.a[adapter]), adapters.b[adapter])
            y[rows] = (y[rows].float() + float(adapters.scale[adapter]) * share.float()).to(y.dtype)
    return y


def launch(
    x: Tensor, weight: Tensor | None, adapters: Adapters, of_row: Tensor, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]
) -> None:
    """Runs the Triton kernels from contiguous x [M, K] into y [M, N]; without a weight they add to what y holds.

    Raises:
        ValueError: As in `linear`; a strided operand; a rank above `MAX_RANK`.
        RuntimeError: Triton is not installed.
    """
    _check(x, y if weight is None else weight, adapters, of_row, bias, base=y if weight is None else None)
    expected = (x.shape[0], adapters.n)
    strided = not all(tensor.is_contiguous() for tensor in (x, adapters.a, adapters.b, y, x if weight is None else weight))
    if tuple(y.shape) != expected or y.dtype != x.dtype or strided:
        raise ValueError(f"x, weight, adapters and y must be contiguous, y {x.dtype} {expected}: got {y.dtype} {tuple(y.shape)}")
    if adapters.rank > MAX_RANK:
        raise ValueError(f"the kernels take a rank up to {MAX_RANK}: got {adapters.rank}")
    if triton is None:
        raise RuntimeError("adapters on a GPU need Triton, which is not installed: pip install 'triton>=3.6'")
    if not y.numel():
        return
    splits = 1 if weight is None else config["splits"]
    sums = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=y.device)
    with torch.cuda.device(y.get_device()):  # on the CPU (-1) it does nothing
        for _, kernel, grid, arguments, options in _launches(x, weight, adapters, of_row, bias if splits == 1 else None, sums, config):
            kernel[grid](*arguments, **options)
    if splits > 1:  # in a fixed order: the same bits at every run
        total = sums.sum(0)
        y.copy_(total if bias is None else total.add_(bias))


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""
    for config, dtype in product(tuned.configurations("linear_lora"), (torch.float16, torch.bfloat16)):
        for rank in (16, MAX_RANK):
            m, n, k = config["m"], config["n"], config["k"]
            x, a, b, y, weight = (
                torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, k), (8, rank, k), (8, n, rank), (m, n), (n, k))
            )
            fused = config["kernel"] == "fused"
            sums = torch.empty(config["splits"], m, n, device="meta") if fused and config["splits"] > 1 else y
            adapters = Adapters(a, b, torch.empty(8, device="meta"))
            of_row = torch.empty(m, dtype=torch.int32, device="meta")
            for name, *case in _launches(x, weight if fused else None, adapters, of_row, None, sums, config):
                wide = name == "expand" and fused and config["block_n"] >= 64
                yield f"linear_lora {name}", f"{dtype}, rank {rank}; {tuned.label(config)}", *case, wide


def _check(x: Tensor, weight: Tensor, adapters: Adapters, of_row: Tensor, bias: Tensor | None, base: Tensor | None = None) -> None:
    n, k = adapters.n, adapters.k
    shape = (x.shape[0], n) if base is not None else (n, k)
    if x.dim() != 2 or x.shape[1] != k or tuple(weight.shape) != shape:
        raise ValueError(
            f"x and {'weight' if base is None else 'y'} must be (M, {k}) and {shape}: got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if tuple(of_row.shape) != (x.shape[0],) or of_row.dtype != torch.int32 or of_row.device != x.device:
        raise ValueError(f"of_row must be torch.int32 ({x.shape[0]},) on {x.device}: got {of_row.dtype} {tuple(of_row.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be {(n,)}: got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("adapters", adapters.a), ("bias", x if bias is None else bias)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x is: got {tensor.dtype} on {tensor.device}")


def _launches(
    x: Tensor, weight: Tensor | None, adapters: Adapters, of_row: Tensor, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Name, kernel, grid, positional arguments and constants of each launch, in their order; y is [splits, M, N] where K is split."""
    (m, k), n, rank = x.shape, adapters.n, adapters.rank
    blocks = {"BLOCK_M": config["block_m"], "BLOCK_K": config["block_k"], "BLOCK_R": max(16, triton.next_power_of_2(rank))}
    options = {"num_warps": config["warps"], "num_stages": config["stages"]}
    parts = torch.empty(config["shrink_splits"], m, rank, dtype=torch.float32, device=x.device)
    rows, columns = triton.cdiv(m, config["block_m"]), triton.cdiv(k, config["block_k"])
    yield (
        "shrink", _shrink_kernel, (rows, config["shrink_splits"]),
        (x, adapters.a, of_row, parts, m, k, rank, triton.cdiv(columns, config["shrink_splits"])), blocks | options,
    )  # fmt: skip
    splits = 1 if weight is None else config["splits"]
    arguments = (
        x, y if weight is None else weight, parts, adapters.b, adapters.scale, of_row, y if bias is None else bias, y, m, n, k, rank,
        triton.cdiv(columns, splits),
    )  # fmt: skip
    constants = {"BASE": weight is None, "BIAS": bias is not None, "PARTS": config["shrink_splits"], "BLOCK_N": config["block_n"]}
    yield "expand", _expand_kernel, (triton.cdiv(n, config["block_n"]), rows, splits), arguments, constants | blocks | options


if triton is not None:

    @triton.jit
    def _shrink_kernel(  # type: ignore[no-untyped-def]
        x, a, of_row, parts, m, k, rank, steps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr
    ):  # fmt: skip
        """(x A^T)^T; the part of K that belongs to program id 1."""
        token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        direction = tl.arange(0, BLOCK_R)
        which = tl.load(of_row + token, mask=token < m, other=-1)
        total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        first = tl.program_id(1) * steps
        last = tl.minimum(first + steps, (k + BLOCK_K - 1) // BLOCK_K)
        lowest, highest = tl.min(tl.where(which < 0, 0x7FFFFFFF, which), 0), tl.max(which, 0)
        for adapter in range(lowest, highest + 1):
            mine = which == adapter
            if tl.max(mine.to(tl.int32), 0) > 0:
                for number in range(first, last):
                    column = number * BLOCK_K + tl.arange(0, BLOCK_K)
                    at_a = (adapter * rank + direction).to(tl.int64)[:, None] * k + column[None, :]
                    left = tl.load(a + at_a, mask=(direction[:, None] < rank) & (column[None, :] < k), other=0.0)
                    at_x = token.to(tl.int64)[None, :] * k + column[:, None]
                    right = tl.load(x + at_x, mask=mine[None, :] & (column[:, None] < k), other=0.0)
                    total = tl.dot(left, right, total)
        at = (tl.program_id(1).to(tl.int64) * m + token[None, :]) * rank + direction[:, None]
        tl.store(parts + at, total, mask=(direction[:, None] < rank) & (token[None, :] < m))

    @triton.jit
    def _expand_kernel(  # type: ignore[no-untyped-def]
        x, weight, parts, b, scale, of_row, bias, y, m, n, k, rank, steps,
        BASE: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """Y^T = W X^T + the adapters' share; with BASE, what y holds stands for the product."""
        dtype: tl.constexpr = x.dtype.element_ty
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row[:, None] < n) & (token[None, :] < m)
        at_y = (tl.program_id(2).to(tl.int64) * m + token[None, :]) * n + row[:, None]
        if BASE:
            total = tl.load(y + at_y, mask=inside, other=0.0).to(tl.float32)
        else:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            first = tl.program_id(2) * steps
            for number in range(first, tl.minimum(first + steps, (k + BLOCK_K - 1) // BLOCK_K)):
                column = number * BLOCK_K + tl.arange(0, BLOCK_K)
                at_w = row.to(tl.int64)[:, None] * k + column[None, :]
                left = tl.load(weight + at_w, mask=(row[:, None] < n) & (column[None, :] < k), other=0.0)
                at_x = token.to(tl.int64)[None, :] * k + column[:, None]
                total = tl.dot(left, tl.load(x + at_x, mask=(column[:, None] < k) & (token[None, :] < m), other=0.0), total)
        if tl.program_id(2) == 0:  # the first part of K carries it
            direction = tl.arange(0, BLOCK_R)
            which = tl.load(of_row + token, mask=token < m, other=-1)
            lowest, highest = tl.min(tl.where(which < 0, 0x7FFFFFFF, which), 0), tl.max(which, 0)
            for adapter in range(lowest, highest + 1):
                mine = which == adapter
                if tl.max(mine.to(tl.int32), 0) > 0:
                    asked = mine[None, :] & (direction[:, None] < rank)
                    at = token.to(tl.int64)[None, :] * rank + direction[:, None]
                    inner = tl.load(parts + at, mask=asked, other=0.0)
                    for part in tl.static_range(1, PARTS):
                        inner += tl.load(parts + part * tl.cast(m, tl.int64) * rank + at, mask=asked, other=0.0)
                    at_b = (adapter * n + row).to(tl.int64)[:, None] * rank + direction[None, :]
                    left = tl.load(b + at_b, mask=(row[:, None] < n) & (direction[None, :] < rank), other=0.0)
                    total += tl.dot(left, inner.to(dtype)) * tl.load(scale + adapter)
        if BIAS:
            total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at_y, total.to(y.dtype.element_ty), mask=inside)
