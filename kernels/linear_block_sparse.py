"""A linear whose weight keeps whole blocks: y = x W^T + b.

A weight [N, K] is cut into blocks of `block_n` x `block_k`; those that the mask drops are not stored, read or multiplied. Kept are

    values   16-bit, flat: for each row of blocks one matrix [block_n, kept * block_k], kept blocks side by side
    column   int32 [kept blocks]: place of each block along K, in the order of the values
    start    int32 [N / block_n + 1]: where the blocks of each row of blocks begin

On CUDA a program takes a row of blocks as the left operand (Y^T = W X^T, as in linear_wq) and the columns of x that it needs; its list of
blocks may be cut into parts, whose float32 sums are added in a fixed order. Time follows the longest row of blocks: masks that keep as many
in every row waste nothing. On the CPU each row of blocks is one dense product. Weights are not rounded; sums are float32.

Source: block-compressed sparse rows; here the blocks of a row stand side by side as one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from autoeff.kernels import split_k, tuned

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["Weight", "flops", "hopper_cases", "launch", "linear", "moved_bytes", "pack", "packed_bytes", "reference"]


@dataclass(frozen=True)
class Weight:
    """A packed weight [N, K], checked once.

    Attributes:
        values: float16 or bfloat16 [kept blocks * block_n * block_k].
        column: int32 [kept blocks].
        start: int32 [N / block_n + 1].
        k: Inputs, a multiple of block_k.
        block_n, block_k: Powers of two, at least 16.

    Raises:
        ValueError: A shape, dtype, size or device that does not belong to the others.
    """

    values: Tensor
    column: Tensor
    start: Tensor
    k: int
    block_n: int
    block_k: int

    def __post_init__(self) -> None:
        for name, size in (("block_n", self.block_n), ("block_k", self.block_k)):
            if size < 16 or size & size - 1:
                raise ValueError(f"{name} must be a power of two, at least 16: got {size}")
        values, column, start = self.values, self.column, self.start
        shape = (column.numel() * self.block_n * self.block_k,)
        if values.dtype not in (torch.float16, torch.bfloat16) or tuple(values.shape) != shape or not values.is_contiguous():
            raise ValueError(f"values must be contiguous float16 or bfloat16 {shape}: got {values.dtype} {tuple(values.shape)}")
        for name, tensor in (("column", column), ("start", start)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1 or tensor.device != values.device:
                raise ValueError(f"{name} must be torch.int32 of rank 1 on {values.device}: got {tensor.dtype} {tuple(tensor.shape)}")
        if self.k % self.block_k or not start.numel():
            raise ValueError(f"k must be a multiple of {self.block_k} and start not empty: got {self.k}, {tuple(start.shape)}")

    @property
    def n(self) -> int:
        return (self.start.numel() - 1) * self.block_n

    @property
    def density(self) -> float:
        """Kept blocks of all blocks."""
        return self.values.numel() / max(1, self.n * self.k)


def pack(weight: Tensor, mask: Tensor) -> Weight:
    """The packed form of a weight [N, K]; exact. What the mask drops is dropped, whatever the weight holds there.

    Args:
        weight: float16 or bfloat16 [N, K].
        mask: bool [N / block_n, K / block_k], which sets the size of the blocks; both are powers of two, at least 16.

    Raises:
        ValueError: Another dtype or rank, or a mask that does not divide the weight into such blocks.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.dim() != 2 or mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(
            f"need float16 or bfloat16 [N, K] and a bool mask: got {weight.dtype} {tuple(weight.shape)}, {mask.dtype} {tuple(mask.shape)}"
        )
    (n, k), (rows, columns) = weight.shape, mask.shape
    if not mask.numel() or n % rows or k % columns:
        raise ValueError(f"a mask {tuple(mask.shape)} does not divide a weight {tuple(weight.shape)}")
    block_n, block_k = n // rows, k // columns
    blocks = weight.view(rows, block_n, columns, block_k)
    values = [blocks[row][:, mask[row]].reshape(-1) for row in range(rows)]
    start = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
    start[1:] = mask.sum(1).cumsum(0)
    return Weight(torch.cat(values), mask.nonzero()[:, 1].int().contiguous(), start, k, block_n, block_k)


def packed_bytes(n: int, blocks: int, block_n: int, block_k: int) -> int:
    """Bytes of the packed tensors of a weight with N rows and so many kept blocks."""
    return blocks * (2 * block_n * block_k + 4) + 4 * (n // block_n + 1)


def moved_bytes(m: int, n: int, k: int, blocks: int, block_n: int, block_k: int) -> int:
    """Bytes that the product reads and writes at the least: packed weight, 16-bit x and y."""
    return packed_bytes(n, blocks, block_n, block_k) + 2 * m * (n + k)


def flops(m: int, blocks: int, block_n: int, block_k: int) -> int:
    """Floating-point operations of the kept blocks."""
    return 2 * m * blocks * block_n * block_k


def reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The exact result, float64 [..., N], block by block from the definition of the format."""
    dense = torch.zeros(weight.n, weight.k, dtype=torch.float64)
    values, starts, columns = weight.values.cpu().double(), weight.start.tolist(), weight.column.tolist()
    size = weight.block_n * weight.block_k
    for row, (first, last) in enumerate(pairwise(starts)):
        side = values[first * size : last * size].view(weight.block_n, (last - first) * weight.block_k)
        for place, column in enumerate(columns[first:last]):
            at = (slice(row * weight.block_n, (row + 1) * weight.block_n), slice(column * weight.block_k, (column + 1) * weight.block_k))
            dense[at] = side[:, place * weight.block_k : (place + 1) * weight.block_k]
    y = x.cpu().double() @ dense.T
    return y if bias is None else y + bias.cpu().double()


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The product x W^T + b, [..., N] in the dtype of x: on CUDA by Triton, on the CPU by torch operations.

    Args:
        x: [..., K] in the dtype of the values.
        weight: On the device of x.
        bias: [N] in the dtype of x.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(x, weight, bias)
    rows = x.reshape(-1, weight.k).contiguous()
    y = torch.empty(rows.shape[0], weight.n, dtype=x.dtype, device=x.device)
    if x.is_cuda:
        launch(rows, weight, bias, y, tuned.nearest("linear_block_sparse", rows.shape[0], weight.n, weight.k, x.device))
    else:
        starts, size = weight.start.tolist(), weight.block_n * weight.block_k
        blocks = rows.view(rows.shape[0], -1, weight.block_k)
        for row, (first, last) in enumerate(pairwise(starts)):
            side = weight.values[first * size : last * size].view(weight.block_n, -1)
            given = blocks[:, weight.column[first:last]].reshape(rows.shape[0], -1)
            torch.mm(given, side.T, out=y[:, row * weight.block_n : (row + 1) * weight.block_n])
        if bias is not None:
            y += bias
    return y.view(*x.shape[:-1], weight.n)


def launch(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernel from contiguous x [M, K] into y [M, N].

    Raises:
        ValueError: As in `linear`.
        RuntimeError: Triton is not installed.
    """
    _check(x, weight, bias)
    split_k.check_output(x, y, weight.n)
    split_k.launch("block-sparse weights", y, bias, config["splits"], lambda added, to: _arguments(x, weight, added, to, config))


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every dtype x block x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""
    for config, dtype, block in product(tuned.configurations("linear_block_sparse"), (torch.float16, torch.bfloat16), (64, 128)):
        m, n, k, splits = config["m"], config["n"], config["k"], config["splits"]
        kept = n * k // block**2 // 4
        column, start = (torch.empty(size, dtype=torch.int32, device="meta") for size in (kept, n // block + 1))
        weight = Weight(torch.empty(kept * block**2, dtype=dtype, device="meta"), column, start, k, block, block)
        x = torch.empty(m, k, dtype=dtype, device="meta")
        y = torch.empty(m, n, dtype=dtype, device="meta") if splits == 1 else torch.empty(splits, m, n, device="meta")
        label = f"{dtype}, blocks of {block}; {tuned.label(config)}"
        yield "linear_block_sparse left", label, *_arguments(x, weight, None, y, config), True


def _check(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    values = weight.values
    if x.dtype != values.dtype or x.shape[-1] != weight.k or x.device != values.device:
        raise ValueError(f"x must be {values.dtype} [..., {weight.k}] on {values.device}: got {x.dtype} {tuple(x.shape)} on {x.device}")
    if bias is not None and (tuple(bias.shape) != (weight.n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias must be {x.dtype} {(weight.n,)} on {x.device}: got {bias.dtype} {tuple(bias.shape)} on {bias.device}")


def _arguments(
    x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Kernel, grid, positional arguments and constants of a launch; y is [splits, M, N] where the blocks are split."""
    (m, k), n = x.shape, weight.n
    # a tile has at most 64 x 64 weights: larger blocks are taken in pieces
    tile_n, tile_k = min(weight.block_n, 64), min(weight.block_k, 64)
    grid = (n // tile_n, triton.cdiv(m, config["block_m"]), config["splits"])
    arguments = (x, weight.values, weight.column, weight.start, y if bias is None else bias, y, m, n, k)
    constants = {
        "BIAS": bias is not None, "SIZE_N": weight.block_n, "SIZE_K": weight.block_k, "BLOCK_N": tile_n, "BLOCK_K": tile_k,
        "BLOCK_M": config["block_m"], "SPLITS": config["splits"], "num_warps": config["warps"], "num_stages": config["stages"],
    }  # fmt: skip
    return _left_kernel, grid, arguments, constants


if triton is not None:

    @triton.jit
    def _left_kernel(  # type: ignore[no-untyped-def]
        x, values, columns, starts, bias, y, m, n, k,
        BIAS: tl.constexpr, SIZE_N: tl.constexpr, SIZE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        PIECES: tl.constexpr = SIZE_K // BLOCK_K
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        of_row = tl.program_id(0) * BLOCK_N // SIZE_N
        first = tl.load(starts + of_row)
        kept = (tl.load(starts + of_row + 1) - first) * PIECES
        share = (kept + SPLITS - 1) // SPLITS
        begin = tl.program_id(2) * share
        inner = tl.arange(0, BLOCK_K)
        # the matrix of this row of blocks, [SIZE_N, kept * BLOCK_K]
        at_w = first.to(tl.int64) * SIZE_N * SIZE_K + (row % SIZE_N).to(tl.int64)[:, None] * (kept * BLOCK_K)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for piece in range(begin, tl.minimum(begin + share, kept)):
            left = tl.load(values + at_w + (piece * BLOCK_K + inner)[None, :])
            column = tl.load(columns + first + piece // PIECES) * SIZE_K + piece % PIECES * BLOCK_K + inner
            at_x = token.to(tl.int64)[None, :] * k + column[:, None]
            total = tl.dot(left, tl.load(x + at_x, mask=(token < m)[None, :], other=0.0), total)
        if BIAS:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        at_y = (tl.program_id(2).to(tl.int64) * m + token[None, :]) * n + row[:, None]
        tl.store(y + at_y, total.to(y.dtype.element_ty), mask=(token < m)[None, :])
