"""A mixture of SwiGLU experts: routing, then y[t] = sum over chosen e of w[t, e] * down[e] (silu(gate[e] x[t]) * (up[e] x[t])).

Routing is that of the base models: softmax over all experts in float32, the `top_k` greatest, renormalised to a sum of 1 or not (Mixtral
and Qwen3-MoE do, OLMoE does not), rounded to the dtype of the logits where the model does that (Qwen3-MoE and OLMoE, not Mixtral).

Experts stand stacked, 16-bit [E, N, K] or packed: a `linear_wq.Weight` of E * N rows. `gate_up` has N = 2 F, gate rows first, as the base
models store it; `down` has N = H, K = F.

On CUDA: the chosen (token, expert) pairs are sorted by expert; the *list* of pairs, not the data, is filled up so that a tile has one
expert; two grouped products with the weight as the left operand follow, SwiGLU in the first one's epilogue and the routing weight in the
second's. Its float32 shares of a token are added in a fixed order. All shapes depend on M, top_k and E alone and nothing is read back, so
that a captured graph stays valid; tiles past the last pair end at once. An expert without tokens costs nothing. On the CPU: torch, expert
by expert, packed ones decoded at each use.

What is rounded to the 16-bit type: silu(gate) * up once, the result once, packed weights as in `linear_wq`. Sums are float32.

Source: tiles over a padded index list, ScatterMoE (Tan et al. 2024, arXiv:2403.08245) and vLLM's fused MoE.
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
from torch.nn.functional import silu

from autoeff.kernels import dequantize_wq, tuned
from autoeff.kernels.dequantize_wq import PLANES, UNIT
from autoeff.kernels.linear_wq import Weight

try:
    import triton
    import triton.language as tl

    from autoeff.kernels.dequantize_wq import load_fields
except ImportError:
    triton = None

__all__ = ["Experts", "Plan", "experts", "flops", "hopper_cases", "launch", "moved_bytes", "plan", "reference", "route", "touched"]


@dataclass(frozen=True)
class Experts:
    """The weights of all experts of a layer, checked once.

    Attributes:
        gate_up: float16 or bfloat16 [E, 2 F, H], or packed with 2 E F rows and K = H.
        down: float16 or bfloat16 [E, H, F], or packed with E H rows and K = F.
        count: E.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others; one packed and one not.
    """

    gate_up: Tensor | Weight
    down: Tensor | Weight
    count: int

    def __post_init__(self) -> None:
        first, second = _rows(self.gate_up), _rows(self.down)
        kinds = {_kind(self.gate_up), _kind(self.down)}
        if len(kinds) > 1 or first[0] % (2 * self.count) or second[0] % self.count:
            raise ValueError(f"gate_up and down must be alike and of {self.count} experts: got {first}, {second} in {kinds}")
        if self.count * second[1] * 2 != first[0] or self.count * first[1] != second[0]:
            raise ValueError(f"gate_up [E, 2 F, H] and down [E, H, F] do not belong together: got rows and K of {first}, {second}")

    @property
    def hidden(self) -> int:
        return _rows(self.gate_up)[1]

    @property
    def ffn(self) -> int:
        return _rows(self.down)[1]

    def dense(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gate and up [2 F, H] and down [H, F] of one expert in `dtype`."""
        return _dense(self.gate_up, expert, self.count, dtype), _dense(self.down, expert, self.count, dtype)


@dataclass(frozen=True)
class Plan:
    """The (token, expert) pairs in the order of the grouped product.

    Attributes:
        pairs: int32 [tiles * block], token * top_k + choice; the number of pairs where a place is empty.
        expert: int32 [tiles], the expert of a tile; E past the last one.
    """

    pairs: Tensor
    expert: Tensor


def route(logits: Tensor, top_k: int, renormalise: bool, rounded: bool = True) -> tuple[Tensor, Tensor]:
    """Chosen experts, int32 [M, top_k], and float32 weights of the same shape.

    Args:
        logits: [M, E].
        top_k: Experts of a token.
        renormalise: Whether the chosen weights of a token add up to 1.
        rounded: Whether the base model rounds the weights to the dtype of the logits.

    Raises:
        ValueError: `top_k` is not in 1 .. E.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be in 1 .. {logits.shape[1]}: got {top_k}")
    weights, chosen = torch.topk(torch.softmax(logits.float(), 1), top_k, dim=1)
    if renormalise:
        weights = weights / weights.sum(1, keepdim=True)
    return chosen.int(), weights.to(logits.dtype).float() if rounded else weights


def plan(chosen: Tensor, count: int, block: int) -> Plan:
    """The pairs of `chosen` [M, top_k] sorted by expert, each expert's filled up to whole tiles of `block`; nothing is read back."""
    flat = chosen.reshape(-1).long()
    device, total = flat.device, flat.numel()
    tiles = min(total, total // block + count)
    counts = torch.zeros(count, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = ((counts + block - 1) // block).cumsum(0)  # in tiles
    order = flat.argsort(stable=True)
    of = flat[order]
    first = counts.cumsum(0) - counts
    starts = (ends - (counts + block - 1) // block) * block
    places = starts[of] + torch.arange(total, device=device) - first[of]
    pairs = torch.full((tiles * block,), total, dtype=torch.int32, device=device)
    expert = torch.searchsorted(ends, torch.arange(tiles, device=device), right=True)
    return Plan(pairs.scatter_(0, places, order.int()), expert.int())


def touched(m: int, count: int, top_k: int) -> float:
    """Experts that M tokens need on average if all are equally likely."""
    return count * (1 - (1 - top_k / count) ** m)


def moved_bytes(m: int, hidden: int, ffn: int, experts: float, bits: int = 16, group: int = 128, symmetric: bool = False) -> int:
    """Bytes that the operation reads and writes at the least: the weights of this many experts, 16-bit x and y."""
    if bits == 16:
        each = 2 * 3 * hidden * ffn
    else:
        each = sum(dequantize_wq.packed_bytes(n, k, bits, group, symmetric) for n, k in ((2 * ffn, hidden), (hidden, ffn)))
    return round(experts * each) + 2 * 2 * m * hidden


def flops(m: int, hidden: int, ffn: int, top_k: int) -> int:
    """Floating-point operations of the three products."""
    return 2 * m * top_k * 3 * hidden * ffn


def reference(x: Tensor, weights: Experts, chosen: Tensor, share: Tensor) -> Tensor:
    """The exact result, float64 [M, H], token by token, with the exact values of packed weights."""
    wide = [_exact(tensor, weights.count) for tensor in (weights.gate_up, weights.down)]
    y = torch.zeros(x.shape[0], weights.hidden, dtype=torch.float64)
    for token, row in enumerate(x.cpu().double()):
        for expert, factor in zip(chosen[token].tolist(), share[token].tolist(), strict=True):
            gate, up = (wide[0][expert] @ row).chunk(2)
            y[token] += factor * (wide[1][expert] @ (gate / (1 + torch.exp(-gate)) * up))
    return y


def experts(x: Tensor, weights: Experts, chosen: Tensor, share: Tensor) -> Tensor:
    """The experts' sum, [M, H] in the dtype of x: on CUDA by Triton, elsewhere by torch.

    Args:
        x: float16 or bfloat16 [M, H]; 16-bit experts are of its dtype.
        weights: On the device of x.
        chosen: int32 [M, top_k], experts of each token, as `route` returns them.
        share: float32 of the same shape.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(x, weights, chosen, share)
    if x.is_cuda:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        mean = max(1, chosen.numel() // weights.count)
        config = tuned.nearest(_op(weights), mean, 2 * weights.ffn, weights.hidden, x.device)
        launch(x.contiguous(), weights, chosen.contiguous(), share.contiguous(), y, config)
        return y
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in sorted(set(chosen.flatten().tolist())):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        gate_up, down = weights.dense(expert, x.dtype)
        gate, up = dense_linear(x[token], gate_up).float().chunk(2, 1)
        found = dense_linear((silu(gate) * up).to(x.dtype), down).float()
        total.index_add_(0, token, found * share[token, choice][:, None])
    return total.to(x.dtype)


def launch(x: Tensor, weights: Experts, chosen: Tensor, share: Tensor, y: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernels from contiguous x [M, H] into y [M, H].

    Raises:
        ValueError: As in `experts`; packed groups that are no multiple of 16.
        RuntimeError: Triton is not installed.
    """
    _check(x, weights, chosen, share)
    if y.shape != x.shape or y.dtype != x.dtype or not all(tensor.is_contiguous() for tensor in (x, y, chosen, share)):
        raise ValueError(f"y must be contiguous {x.dtype} {tuple(x.shape)}, and so the others: got {y.dtype} {tuple(y.shape)}")
    for weight in (weights.gate_up, weights.down):
        if isinstance(weight, Weight) and weight.group % 16:
            raise ValueError(f"the grouped kernel needs a group that is a multiple of 16: got {weight.group}")
    if triton is None:
        raise RuntimeError("experts on a GPU need Triton, which is not installed: pip install 'triton>=3.6'")
    if not y.numel():
        return
    laid = plan(chosen, weights.count, config["block_m"])
    hidden = torch.empty(chosen.numel(), weights.ffn, dtype=x.dtype, device=x.device)
    parts = torch.empty(*chosen.shape, weights.hidden, dtype=torch.float32, device=x.device)
    with torch.cuda.device(y.get_device()):  # on the CPU (-1) it does nothing
        for _, kernel, grid, arguments, options in _launches(x, weights, chosen.shape[1], laid, share, hidden, parts, config):
            kernel[grid](*arguments, **options)
    y.copy_(parts.sum(1))


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every width x dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(n: int, k: int, bits: int) -> Weight:
        planes = {f"plane{p}": meta(n, k * p // 8, dtype=torch.uint8) for p in PLANES[bits]}
        scale = meta(n, k // 128, dtype=torch.float16)
        return Weight(planes, scale, scale, bits, k, 128)

    count, top_k = 8, 2
    plans = [(config, 16) for config in tuned.configurations("moe")]
    plans += list(product(tuned.configurations("moe_wq"), PLANES))
    for (config, bits), dtype in product(plans, (torch.float16, torch.bfloat16)):
        ffn, hidden, m = config["n"] // 2, config["k"], config["m"] * count // top_k
        if bits == 16:
            weights = Experts(meta(count, 2 * ffn, hidden, dtype=dtype), meta(count, hidden, ffn, dtype=dtype), count)
        else:
            weights = Experts(packed(count * 2 * ffn, hidden, bits), packed(count * hidden, ffn, bits), count)
        tiles = m * top_k // config["block_m"] + count
        laid = Plan(meta(tiles * config["block_m"], dtype=torch.int32), meta(tiles, dtype=torch.int32))
        share, middle = meta(m, top_k, dtype=torch.float32), meta(m * top_k, ffn, dtype=dtype)
        parts = meta(m, top_k, hidden, dtype=torch.float32)
        for name, *case in _launches(meta(m, hidden, dtype=dtype), weights, top_k, laid, share, middle, parts, config):
            yield f"moe {name}", f"{bits} bit, {dtype}; {tuned.label(config)}", *case, config["block_n"] >= 64


def _rows(weight: Tensor | Weight) -> tuple[int, int]:
    """Rows of all experts, and K."""
    if isinstance(weight, Weight):
        return weight.n, weight.k
    if weight.dim() != 3 or weight.dtype not in (torch.float16, torch.bfloat16) or not weight.is_contiguous():
        raise ValueError(f"experts must be contiguous float16 or bfloat16 [E, N, K]: got {weight.dtype} {tuple(weight.shape)}")
    return weight.shape[0] * weight.shape[1], weight.shape[2]


def _kind(weight: Tensor | Weight) -> str:
    if isinstance(weight, Weight):
        return f"{weight.bits} bit on {weight.scale.device}"
    return f"{weight.dtype} on {weight.device}"


def _op(weights: Experts) -> str:
    return "moe_wq" if isinstance(weights.gate_up, Weight) else "moe"


def _dense(weight: Tensor | Weight, expert: int, count: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[expert].to(dtype)
    n = weight.n // count
    rows = slice(expert * n, (expert + 1) * n)
    planes, minimum = {name: plane[rows] for name, plane in weight.planes.items()}, None if weight.minimum is None else weight.minimum[rows]
    return Weight(planes, weight.scale[rows], minimum, weight.bits, weight.k, weight.group).dense(dtype)


def _exact(weight: Tensor | Weight, count: int) -> Tensor:
    """[E, N, K] in float64."""
    if isinstance(weight, Tensor):
        return weight.cpu().double()
    exact = dequantize_wq.reference(weight.planes, weight.scale, weight.minimum, weight.bits, weight.k, weight.group)
    return exact.view(count, -1, weight.k)


def _check(x: Tensor, weights: Experts, chosen: Tensor, share: Tensor) -> None:
    first = weights.gate_up
    device = first.scale.device if isinstance(first, Weight) else first.device
    right = x.dtype in (torch.float16, torch.bfloat16) and (isinstance(first, Weight) or x.dtype == first.dtype)
    if not right or x.dim() != 2 or x.shape[1] != weights.hidden or x.device != device:
        kind = "float16 or bfloat16" if isinstance(first, Weight) else first.dtype
        raise ValueError(f"x must be {kind} [M, {weights.hidden}] on {device}: got {x.dtype} {tuple(x.shape)} on {x.device}")
    if chosen.dtype != torch.int32 or chosen.dim() != 2 or chosen.shape[0] != x.shape[0] or chosen.device != device:
        raise ValueError(f"chosen must be torch.int32 [{x.shape[0]}, top_k] on {device}: got {chosen.dtype} {tuple(chosen.shape)}")
    if share.dtype != torch.float32 or share.shape != chosen.shape or share.device != device:
        raise ValueError(f"share must be torch.float32 {tuple(chosen.shape)} on {device}: got {share.dtype} {tuple(share.shape)}")


def _launches(
    x: Tensor, weights: Experts, top_k: int, laid: Plan, share: Tensor, hidden: Tensor, parts: Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Name, kernel, grid, positional arguments and constants of each launch, in their order."""
    pairs = hidden.shape[0]
    steps = (
        ("gate_up", x, weights.gate_up, hidden, weights.ffn, weights.hidden, top_k),
        ("down", hidden, weights.down, parts, weights.hidden, weights.ffn, 1),
    )
    for name, inputs, weight, out, n, k, each in steps:
        constants: dict[str, Any] = {
            "GATED": name == "gate_up", "EACH": each, "BLOCK_N": config["block_n"], "BLOCK_M": config["block_m"],
            "num_warps": config["warps"], "num_stages": config["stages"],
        }  # fmt: skip
        if isinstance(weight, Weight):
            words, packing = dequantize_wq.words_of(weight.planes, weight.bits, weight.k)
            if packing["WHOLE"] and weight.bits == 8:
                words = (words[0].view(torch.int32),) * 2
            minimum = weight.scale if weight.minimum is None else weight.minimum
            tensors: tuple[Tensor, ...] = (*words, weight.scale, minimum)
            block_k = min(config["block_k"], weight.group & -weight.group)  # a step stays inside a group
            groups = weight.scale.shape[1]
            constants |= packing | {
                "BITS": weight.bits, "GROUP_U": weight.group // UNIT, "MINIMUM": weight.minimum is not None,
                "CODES_16": weight.bits < 8 or x.dtype == torch.float16, "WORDS_8": packing["WHOLE"] and weight.bits == 8,
                "BLOCK_U": block_k // UNIT,
            }  # fmt: skip
        else:
            tensors, groups = (weight,) * 4, 0
            constants |= {
                "LOW_P": 0, "HIGH_P": 0, "WHOLE": False, "BITS": 16, "GROUP_U": 1, "MINIMUM": False, "CODES_16": False,
                "WORDS_8": False, "BLOCK_U": config["block_k"] // UNIT,
            }  # fmt: skip
        grid = (triton.cdiv(n, config["block_n"]), laid.expert.shape[0])
        sizes = (pairs, weights.count, n, k, -(-k // UNIT), groups)
        arguments = (inputs, *tensors, laid.pairs, laid.expert, share, out, _eight(x.device), *sizes)
        yield name, _grouped_kernel, grid, arguments, constants


@cache
def _eight(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.int32, device=device)


if triton is not None:

    @triton.jit
    def _tile(  # type: ignore[no-untyped-def]
        low, high, scale, minimum, at_n, inside_n, start, eight, k, units, groups, DTYPE: tl.constexpr,
        LOW_P: tl.constexpr, HIGH_P: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr, GROUP_U: tl.constexpr, MINIMUM: tl.constexpr,
        CODES_16: tl.constexpr, WORDS_8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
    ):  # fmt: skip
        """Rows `at_n` of the weight, BLOCK_U units from `start` on; packed ones as in linear_wq."""
        if BITS == 16:
            column = start * 8 + tl.arange(0, BLOCK_U * 8)
            return tl.load(low + at_n[:, None] * k + column[None, :], mask=inside_n[:, None] & (column[None, :] < k), other=0.0)
        ZERO: tl.constexpr = 1 << (BITS - 1)
        row = at_n[:, None]
        j = tl.load(eight + tl.arange(0, 8))[None, None, :]
        unit = start + tl.arange(0, BLOCK_U)[None, :]
        mask = inside_n[:, None] & (unit < units)
        inside = mask[:, :, None] & ((unit * 8)[:, :, None] + tl.arange(0, 8)[None, None, :] < k)
        if WORDS_8:  # four codes a word, as in linear_wq
            quad = start * 2 + tl.arange(0, BLOCK_U * 2)[None, :]
            word = tl.load(low + row * (units * 2) + quad, mask=inside_n[:, None] & (quad < units * 2), other=0)
            code = (word[:, :, None] >> 8 * tl.load(eight + tl.arange(0, 4))[None, None, :]) & 255
        else:
            code = load_fields(low, row, unit, mask, inside, j, k, units, LOW_P, WHOLE)
            if HIGH_P:
                code = code | (load_fields(high, row, unit, mask, inside, j, k, units, HIGH_P, WHOLE) << LOW_P)
        at = at_n * groups + start // GROUP_U
        step = tl.load(scale + at, mask=inside_n, other=0.0)
        if not CODES_16:
            centred = (code - ZERO).to(DTYPE)
        elif tl.float16 == DTYPE:
            centred = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
        else:
            centred = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (128.0 + ZERO)
        value = tl.reshape(centred.to(DTYPE), (BLOCK_N, BLOCK_U * 8)) * step.to(DTYPE)[:, None]
        if MINIMUM:
            shift = tl.load(minimum + at, mask=inside_n, other=0.0)
            value += (shift.to(tl.float32) + ZERO * step.to(tl.float32)).to(DTYPE)[:, None]
        return value

    @triton.jit
    def _grouped_kernel(  # type: ignore[no-untyped-def]
        x, low, high, scale, minimum, listed, of_tile, share, y, eight, pairs, count, n, k, units, groups,
        GATED: tl.constexpr, EACH: tl.constexpr, LOW_P: tl.constexpr, HIGH_P: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr,
        GROUP_U: tl.constexpr, MINIMUM: tl.constexpr, CODES_16: tl.constexpr, WORDS_8: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr,
    ):  # fmt: skip
        """Y^T = W[e] X^T for the pairs of a tile; GATED: silu of the gate rows times the up rows, else times the routing weight."""
        dtype: tl.constexpr = x.dtype.element_ty
        expert = tl.load(of_tile + tl.program_id(1)).to(tl.int64)
        if expert >= count:  # the grid is as large as the worst case
            return
        at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = at_n < n
        pair = tl.load(listed + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))
        there = pair < pairs
        source = (pair // EACH).to(tl.int64)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        beside = total
        row = expert * (2 * n if GATED else n) + at_n  # E N K may pass 2^31
        for number in range((units + BLOCK_U - 1) // BLOCK_U):
            start = number * BLOCK_U
            column = start * 8 + tl.arange(0, BLOCK_U * 8)
            right = tl.load(x + source[None, :] * k + column[:, None], mask=(column[:, None] < k) & there[None, :], other=0.0)
            left = _tile(
                low, high, scale, minimum, row, inside_n, start, eight, k, units, groups, dtype, LOW_P, HIGH_P, WHOLE, BITS, GROUP_U,
                MINIMUM, CODES_16, WORDS_8, BLOCK_N, BLOCK_U,
            )  # fmt: skip
            total = tl.dot(left, right, total)
            if GATED:
                left = _tile(
                    low, high, scale, minimum, row + n, inside_n, start, eight, k, units, groups, dtype, LOW_P, HIGH_P, WHOLE, BITS,
                    GROUP_U, MINIMUM, CODES_16, WORDS_8, BLOCK_N, BLOCK_U,
                )  # fmt: skip
                beside = tl.dot(left, right, beside)
        if GATED:
            total = total / (1.0 + tl.exp(-total)) * beside
        else:
            total *= tl.load(share + pair, mask=there, other=0.0)[None, :]
        at_y = pair.to(tl.int64)[None, :] * n + at_n[:, None]
        tl.store(y + at_y, total.to(y.dtype.element_ty), mask=inside_n[:, None] & there[None, :])
