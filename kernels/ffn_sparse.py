"""A SwiGLU FFN that skips channels whose activation is small: y = W_down t2(silu(W_gate t1(x)) * (W_up t1(x))), for one to four tokens.

t(v) sets what is at most a threshold in magnitude to 0, number by number; 0 as threshold keeps every number that differs from 0. Weights
are stored by *input* channel, `gate_up` [H, 2 F] (gate first) and `down` [F, H], so that a skipped channel is a row that is not read. A
channel is skipped if no token keeps it: with several tokens the union is read, which leaves little to skip beyond four.

On CUDA: a program lists the kept channels, the product reads those rows alone, its float32 parts are added in a fixed order; the same again
for `down`. Counts stay on the device: a captured graph stays valid. On the CPU the kept rows are copied, which pays where more than about
two thirds are skipped.

What is rounded to the 16-bit type: silu(gate) * up, before the second threshold, and the result. Sums are float32.

Source: TEAL (Liu et al. 2024, arXiv:2408.14690); Deja Vu (Liu et al. 2023, arXiv:2310.17157).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from autoeff.kernels import tuned

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["MAX_ROWS", "Ffn", "ffn", "flops", "hopper_cases", "launch", "moved_bytes", "pack", "reference"]

MAX_ROWS = 4
"""Tokens that the Triton kernels take; more are served by dense products."""
_BLOCK_LIST = 1024


@dataclass(frozen=True)
class Ffn:
    """The weights by input channel, checked once.

    Attributes:
        gate_up: float16 or bfloat16 [H, 2 F], contiguous, gate first.
        down: [F, H], of the same dtype.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the other.
    """

    gate_up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        first, second = self.gate_up, self.down
        if first.dtype not in (torch.float16, torch.bfloat16) or first.dim() != 2 or first.shape[1] % 2 or not first.is_contiguous():
            raise ValueError(f"gate_up must be contiguous float16 or bfloat16 [H, 2 F]: got {first.dtype} {tuple(first.shape)}")
        shape = (first.shape[1] // 2, first.shape[0])
        if second.dtype != first.dtype or tuple(second.shape) != shape or second.device != first.device or not second.is_contiguous():
            raise ValueError(f"down must be contiguous {first.dtype} {shape} on {first.device}: got {second.dtype} {tuple(second.shape)}")

    @property
    def hidden(self) -> int:
        return self.gate_up.shape[0]

    @property
    def ffn(self) -> int:
        return self.down.shape[0]


def pack(gate: Tensor, up: Tensor, down: Tensor) -> Ffn:
    """The form that this kernel reads, from gate [F, H], up [F, H] and down [H, F] as a linear stores them."""
    return Ffn(torch.cat([gate, up]).T.contiguous(), down.T.contiguous())


def moved_bytes(m: int, hidden: int, ffn: int, kept_hidden: int, kept_ffn: int) -> int:
    """Bytes that the operation reads and writes at the least, for so many kept channels."""
    return 2 * (kept_hidden * 2 * ffn + kept_ffn * hidden + 2 * m * hidden)


def flops(m: int, hidden: int, ffn: int, kept_hidden: int, kept_ffn: int) -> int:
    """Floating-point operations for so many kept channels."""
    return 2 * m * (kept_hidden * 2 * ffn + kept_ffn * hidden)


def reference(x: Tensor, weights: Ffn, thresholds: tuple[float, float]) -> Tensor:
    """The result, float64 [M, H]; the inner activation is rounded to the dtype of x, since a threshold follows."""
    wide = x.cpu().double()
    gate, up = (wide * (wide.abs() > thresholds[0]) @ weights.gate_up.cpu().double()).chunk(2, 1)
    inner = (gate / (1 + torch.exp(-gate)) * up).to(x.dtype).double()
    return inner * (inner.abs() > thresholds[1]) @ weights.down.cpu().double()


def ffn(x: Tensor, weights: Ffn, thresholds: tuple[float, float]) -> Tensor:
    """The FFN's result, [M, H] in the dtype of x: on CUDA by Triton for up to `MAX_ROWS` tokens, else by torch.

    Args:
        x: float16 or bfloat16 [M, H].
        weights: In its dtype.
        thresholds: Of x, and of the inner activation; at least 0.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others; a threshold below 0.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(x, weights, thresholds)
    if x.is_cuda and x.shape[0] <= MAX_ROWS:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        launch(x.contiguous(), weights, thresholds, y, tuned.nearest("ffn_sparse", x.shape[0], weights.ffn, weights.hidden, x.device))
        return y
    gate, up = _kept_product(x, weights.gate_up, thresholds[0]).chunk(2, 1)
    inner = (silu(gate.float()) * up.float()).to(x.dtype)
    return _kept_product(inner, weights.down, thresholds[1]).to(x.dtype)


def launch(x: Tensor, weights: Ffn, thresholds: tuple[float, float], y: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernels from contiguous x [M, H] into y [M, H].

    Raises:
        ValueError: As in `ffn`; more than `MAX_ROWS` tokens.
        RuntimeError: Triton is not installed.
    """
    _check(x, weights, thresholds)
    if y.shape != x.shape or y.dtype != x.dtype or not (x.is_contiguous() and y.is_contiguous()):
        raise ValueError(f"y must be contiguous {x.dtype} {tuple(x.shape)}: got {y.dtype} {tuple(y.shape)}")
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"the kernels take at most {MAX_ROWS} tokens: got {x.shape[0]}")
    if triton is None:
        raise RuntimeError("skipping channels on a GPU needs Triton, which is not installed: pip install 'triton>=3.6'")
    if not y.numel():
        return
    with torch.cuda.device(y.get_device()):  # on the CPU (-1) it does nothing
        for _, kernel, grid, arguments, options in _launches(x, weights, thresholds, y, config):
            kernel[grid](*arguments, **options)


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""
    for dtype in (torch.float16, torch.bfloat16):
        seen = set()
        for config in tuned.configurations("ffn_sparse"):
            m, inner, hidden = config["m"], config["n"], config["k"]
            x, gate_up, down = (torch.empty(s, dtype=dtype, device="meta") for s in ((m, hidden), (hidden, 2 * inner), (inner, hidden)))
            for name, *case in _launches(x, Ffn(gate_up, down), (0.1, 0.1), x, config):
                if (name, m) not in seen:  # the second product is the first one's kernel
                    seen.add((name, m))
                    yield f"ffn_sparse {name}", f"{dtype}; {tuned.label(config)}", *case, False


def _check(x: Tensor, weights: Ffn, thresholds: tuple[float, float]) -> None:
    first = weights.gate_up
    if x.dtype != first.dtype or x.dim() != 2 or x.shape[1] != weights.hidden or x.device != first.device:
        raise ValueError(f"x must be {first.dtype} [M, {weights.hidden}] on {first.device}: got {x.dtype} {tuple(x.shape)} on {x.device}")
    if min(thresholds) < 0:
        raise ValueError(f"thresholds must be at least 0: got {thresholds}")


def _kept_product(x: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """float32 for few rows, the dtype of x where most channels are kept anyway."""
    kept = x * (x.abs() > threshold)
    channels = kept.any(0)
    if x.shape[0] > MAX_ROWS or 3 * int(channels.sum()) > channels.numel():
        return kept @ weight
    at = channels.nonzero()[:, 0]
    return kept[:, at] @ weight[at]


def _launches(
    x: Tensor, weights: Ffn, thresholds: tuple[float, float], y: Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Name, kernel, grid, positional arguments and constants of each launch, in their order."""
    m, device = x.shape[0], x.device
    inner = torch.empty(m, weights.ffn, dtype=x.dtype, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    splits, block_n = config["splits"], config["block_n"]
    steps = ((x, weights.gate_up, inner, thresholds[0], True), (inner, weights.down, y, thresholds[1], False))
    for given, weight, out, threshold, gated in steps:
        k, n = weight.shape
        listed = torch.empty(k, dtype=torch.int32, device=device)
        parts = torch.empty(splits, m, n, dtype=torch.float32, device=device)
        yield "list", _list_kernel, (1,), (given, listed, count, threshold, k), {"M": m, "BLOCK_K": _BLOCK_LIST, "num_warps": 8}
        yield (
            "product", _product_kernel, (triton.cdiv(n, block_n), splits), (given, weight, listed, count, parts, threshold, n, k),
            {"M": m, "SPLITS": splits, "BLOCK_N": block_n, "BLOCK_C": config["block_c"], "num_warps": config["warps"],
             "num_stages": config["stages"]},
        )  # fmt: skip
        wide = out.shape[1]
        constants = {"GATED": gated, "SPLITS": splits, "BLOCK_N": 256, "num_warps": 4}
        yield f"join {'gated' if gated else 'plain'}", _join_kernel, (triton.cdiv(wide, 256), m), (parts, out, m, wide), constants


if triton is not None:

    @triton.jit
    def _list_kernel(x, listed, count, threshold, k, M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
        """One program: the kept channels in their order."""
        found = 0
        for start in range(0, k, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            greatest = tl.zeros((BLOCK_K,), tl.float32)
            for token in tl.static_range(M):
                value = tl.load(x + token * k + column, mask=column < k, other=0.0).to(tl.float32)
                greatest = tl.maximum(greatest, tl.abs(value))
            kept = (greatest > threshold).to(tl.int32)
            tl.store(listed + found + tl.cumsum(kept, 0) - 1, column, mask=kept > 0)
            found += tl.sum(kept, 0)
        tl.store(count, found)

    @triton.jit
    def _product_kernel(  # type: ignore[no-untyped-def]
        x, weight, listed, count, parts, threshold, n, k,
        M: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        # a tile of sums for each token; one reduction at the end instead of one a step
        sum0 = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        sum1 = sum0
        sum2 = sum0
        sum3 = sum0
        kept = tl.load(count)
        share = ((kept + SPLITS - 1) // SPLITS + BLOCK_C - 1) // BLOCK_C * BLOCK_C
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, kept)
        for start in range(first, last, BLOCK_C):
            place = start + tl.arange(0, BLOCK_C)
            channel = tl.load(listed + place, mask=place < last, other=0)
            inside = (place < last)[:, None] & (column < n)[None, :]
            tile = tl.load(weight + channel.to(tl.int64)[:, None] * n + column[None, :], mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + channel, mask=place < last, other=0.0).to(tl.float32)
            sum0 += tile * tl.where(tl.abs(value) > threshold, value, 0.0)[:, None]
            if M > 1:
                value = tl.load(x + k + channel, mask=place < last, other=0.0).to(tl.float32)
                sum1 += tile * tl.where(tl.abs(value) > threshold, value, 0.0)[:, None]
            if M > 2:
                value = tl.load(x + 2 * k + channel, mask=place < last, other=0.0).to(tl.float32)
                sum2 += tile * tl.where(tl.abs(value) > threshold, value, 0.0)[:, None]
            if M > 3:
                value = tl.load(x + 3 * k + channel, mask=place < last, other=0.0).to(tl.float32)
                sum3 += tile * tl.where(tl.abs(value) > threshold, value, 0.0)[:, None]
        at = parts + tl.program_id(1) * M * n + column
        tl.store(at, tl.sum(sum0, 0), mask=column < n)
        if M > 1:
            tl.store(at + n, tl.sum(sum1, 0), mask=column < n)
        if M > 2:
            tl.store(at + 2 * n, tl.sum(sum2, 0), mask=column < n)
        if M > 3:
            tl.store(at + 3 * n, tl.sum(sum3, 0), mask=column < n)

    @triton.jit
    def _join_kernel(parts, out, m, n, GATED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
        """The parts of a token added in their order; GATED: silu of the first half times the second."""
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        width = 2 * n if GATED else n
        total = tl.zeros((BLOCK_N,), tl.float32)
        beside = total
        for part in range(SPLITS):
            at = parts + (part * m + tl.program_id(1)) * width + column
            total += tl.load(at, mask=column < n, other=0.0)
            if GATED:
                beside += tl.load(at + n, mask=column < n, other=0.0)
        if GATED:
            total = total / (1.0 + tl.exp(-total)) * beside
        tl.store(out + tl.program_id(1) * n + column, total.to(out.dtype.element_ty), mask=column < n)
