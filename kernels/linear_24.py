"""A linear with 2:4 sparse weights in a memory format: of every four weights along K at most two are kept, in 9 of 16 bits a weight.

A weight [N, K] (K a multiple of 4) is kept as

    values   [N, K / 2] in float16 or bfloat16: the two kept of each four, in the order of their places
    places   uint8 [N, ceil(K / 8)]: 4 bits for each four, low bits first: place of the first value + 4 * place of the second, in 0 .. 3

On CUDA few rows go through `left`: the tile is spread out in registers as the left operand of the (dense) tensor core; what is saved is
memory traffic, 1.125 instead of 2 bytes a weight, not arithmetic. Many rows: spread out once, then the library's product. On the CPU the
weight is spread out at every call: the format saves memory there, not time. The weights are not rounded; sums are float32.

Source: the 2:4 pattern, Mishra et al. 2021 (arXiv:2104.08378).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

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
        values: float16 or bfloat16 [N, K / 2].
        places: uint8 [N, ceil(K / 8)].

    Raises:
        ValueError: A shape, dtype or device that does not belong to the other.
    """

    values: Tensor
    places: Tensor

    def __post_init__(self) -> None:
        values, places = self.values, self.places
        if values.dtype not in (torch.float16, torch.bfloat16) or values.dim() != 2 or values.shape[1] % 2 or not values.is_contiguous():
            raise ValueError(f"values must be contiguous float16 or bfloat16 [N, K / 2]: got {values.dtype} {tuple(values.shape)}")
        shape = (values.shape[0], -(-values.shape[1] // 4))
        if places.dtype != torch.uint8 or tuple(places.shape) != shape or places.device != values.device or not places.is_contiguous():
            found = f"{places.dtype} {tuple(places.shape)} on {places.device}"
            raise ValueError(f"places must be contiguous torch.uint8 {shape} on {values.device}: got {found}")

    @property
    def n(self) -> int:
        return self.values.shape[0]

    @property
    def k(self) -> int:
        return 2 * self.values.shape[1]

    def dense(self) -> Tensor:
        """[N, K] with its zeros."""
        fours = torch.stack((self.places & 15, self.places >> 4), -1).view(self.n, -1)[:, : self.k // 4]
        at = torch.stack((fours & 3, fours >> 2), -1).long()
        spread = torch.zeros(self.n, self.k // 4, 4, dtype=self.values.dtype, device=self.values.device)
        return spread.scatter_(2, at, self.values.view(self.n, -1, 2)).view(self.n, self.k)


def pack(weight: Tensor) -> Weight:
    """The packed form of a weight that is 2:4 already; exact.

    Args:
        weight: float16 or bfloat16 [N, K]; at most two of every four along K differ from 0.

    Raises:
        ValueError: Another dtype or rank, K no multiple of 4, or three weights of a four that are not 0.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(f"the weight must be float16 or bfloat16 [N, multiple of 4]: got {weight.dtype} {tuple(weight.shape)}")
    n, k = weight.shape
    fours = weight.reshape(n, k // 4, 4)
    kept = fours != 0
    if bool((kept.sum(2) > 2).any()):
        row, four = (int(index[0]) for index in torch.nonzero(kept.sum(2) > 2, as_tuple=True))
        raise ValueError(
            f"not 2:4: row {row} keeps {int(kept[row, four].sum())} of the weights {4 * four} .. {4 * four + 3}; at most 2 are allowed"
        )
    # kept ones first, in the order of their places; then as many zeros as are missing, put in order too
    first_two = kept.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :2].sort(2).values
    nibbles = pad((first_two[:, :, 0] | first_two[:, :, 1] << 2).to(torch.uint8), (0, k // 4 % 2))
    return Weight(fours.gather(2, first_two).reshape(n, k // 2), nibbles[:, ::2] | nibbles[:, 1::2] << 4)


def packed_bytes(n: int, k: int) -> int:
    """Bytes of the packed tensors of a weight [n, k]."""
    return n * (k + -(-k // 8))


def moved_bytes(m: int, n: int, k: int) -> int:
    """Bytes that the product reads and writes at the least: packed weight, 16-bit x and y."""
    return packed_bytes(n, k) + 2 * m * (n + k)


def flops(m: int, n: int, k: int) -> int:
    """Floating-point operations of the dense product, which is what runs."""
    return 2 * m * n * k


def reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The exact result, float64 [..., N], from the definition of the format, value by value."""
    dense = torch.zeros(weight.n, weight.k, dtype=torch.float64)
    values, places = weight.values.cpu().double(), weight.places.cpu().int()
    for index in range(weight.k // 2):
        four, second = divmod(index, 2)
        place = places[:, four // 2] >> 4 * (four % 2) + 2 * second & 3
        dense[torch.arange(weight.n), 4 * four + place] += values[:, index]
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
    if x.is_cuda:
        rows = x.reshape(-1, weight.k).contiguous()
        config = tuned.nearest("linear_24", rows.shape[0], weight.n, weight.k, x.device)
        if config["kernel"] == "left":
            y = torch.empty(rows.shape[0], weight.n, dtype=x.dtype, device=x.device)
            launch(rows, weight, bias, y, config)
            return y.view(*x.shape[:-1], weight.n)
    return dense_linear(x, weight.dense(), bias)


def launch(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernel from contiguous x [M, K] into y [M, N].

    Raises:
        ValueError: As in `linear`.
        RuntimeError: Triton is not installed.
    """
    _check(x, weight, bias)
    split_k.check_output(x, y, weight.n)
    split_k.launch("2:4 weights", y, bias, config["splits"], lambda added, to: _arguments(x, weight, added, to, config))


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""
    for config, dtype in product(tuned.configurations("linear_24"), (torch.float16, torch.bfloat16)):
        if config["kernel"] == "left":
            m, n, k, splits = config["m"], config["n"], config["k"], config["splits"]
            x = torch.empty(m, k, dtype=dtype, device="meta")
            weight = Weight(torch.empty(n, k // 2, dtype=dtype, device="meta"), torch.empty(n, k // 8, dtype=torch.uint8, device="meta"))
            y = torch.empty(m, n, dtype=dtype, device="meta") if splits == 1 else torch.empty(splits, m, n, device="meta")
            yield "linear_24 left", f"{dtype}; {tuned.label(config)}", *_arguments(x, weight, None, y, config), config["block_n"] >= 64


def _check(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    values = weight.values
    if x.dtype != values.dtype or x.shape[-1] != weight.k or x.device != values.device:
        raise ValueError(f"x must be {values.dtype} [..., {weight.k}] on {values.device}: got {x.dtype} {tuple(x.shape)} on {x.device}")
    if bias is not None and (tuple(bias.shape) != (weight.n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias must be {x.dtype} {(weight.n,)} on {x.device}: got {bias.dtype} {tuple(bias.shape)} on {bias.device}")


def _arguments(
    x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Kernel, grid, positional arguments and constants of a launch; y is [splits, M, N] where K is split."""
    (m, k), n, splits = x.shape, weight.n, config["splits"]
    grid = (triton.cdiv(n, config["block_n"]), triton.cdiv(m, config["block_m"]), splits)
    steps = triton.cdiv(triton.cdiv(k, config["block_k"]), splits)
    pairs = weight.values.view(torch.int32)  # two kept values in a word
    arguments = (x, pairs, weight.places, y if bias is None else bias, y, _four(x.device), m, n, k, -(-k // 8), steps)
    constants = {
        "BIAS": bias is not None, "BLOCK_N": config["block_n"], "BLOCK_M": config["block_m"], "BLOCK_U": config["block_k"] // 8,
        "num_warps": config["warps"], "num_stages": config["stages"],
    }  # fmt: skip
    return _left_kernel, grid, arguments, constants


@cache
def _four(device: torch.device) -> Tensor:
    return torch.arange(4, dtype=torch.int32, device=device)


if triton is not None:

    @triton.jit
    def _left_kernel(  # type: ignore[no-untyped-def]
        x, pairs, places, bias, y, four, m, n, k, units, steps,
        BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = x.dtype.element_ty
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_3 = row.to(tl.int64)[:, None, None]
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # small numbers from memory, as in linear_wq: the compiler moves the operand layout up to loads, not past a `tl.arange`
        half = tl.load(four + tl.arange(0, 2))[None, None, :]
        place = tl.load(four + tl.arange(0, 4))[None, None, None, :]
        first = tl.program_id(2) * steps
        for number in range(first, tl.minimum(first + steps, (units + BLOCK_U - 1) // BLOCK_U)):
            unit = number * BLOCK_U + tl.arange(0, BLOCK_U)
            byte = tl.load(
                places + row.to(tl.int64)[:, None] * units + unit[None, :], mask=(row[:, None] < n) & (unit[None, :] < units), other=0
            )
            pair = unit[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
            word = tl.load(pairs + row_3 * (k // 4) + pair, mask=(row_3 < n) & (pair < k // 4), other=0)[:, :, :, None]
            nibble = (byte.to(tl.int32)[:, :, None] >> 4 * half)[:, :, :, None]
            bits = tl.where((nibble & 3) == place, word & 0xFFFF, tl.where(((nibble >> 2) & 3) == place, word >> 16, 0))
            left = tl.reshape(bits.to(tl.int16).to(dtype, bitcast=True), (BLOCK_N, BLOCK_U * 8))
            column = number * BLOCK_U * 8 + tl.arange(0, BLOCK_U * 8)
            at_x = token.to(tl.int64)[None, :] * k + column[:, None]
            right = tl.load(x + at_x, mask=(column[:, None] < k) & (token[None, :] < m), other=0.0)
            total = tl.dot(left, right, total)
        if BIAS:
            total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        at_y = (tl.program_id(2).to(tl.int64) * m + token[None, :]) * n + row[:, None]
        tl.store(y + at_y, total.to(y.dtype.element_ty), mask=(row[:, None] < n) & (token[None, :] < m))
