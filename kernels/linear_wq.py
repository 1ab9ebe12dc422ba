"""A linear with weights of 2, 3, 4, 6 or 8 bits: y = x W^T + b, in the packed format of `dequantize_wq`.

On CUDA three regimes, chosen by `tuned.nearest` from the number of rows M:

    gemv        M = 1 .. 4: products in float32 beside the unpacking, summed once at the end; M rows share an unpacked weight
    left        up to some 128 rows: tensor cores, the weight as the *left* operand (Y^T = W X^T), so that its 64 rows fill the
                instruction although M does not; K may be split over programs, whose sums are added in a fixed order
    dequantize  above: the weight is written out in 16 bits once, then the library's matrix product

On the CPU `linear` with a `Weight` decodes it at every call (exact, slow); `CpuWeight` repacks it once for torch's packed int4 kernel,
which takes bfloat16 activations only. See there for what it rounds.

What is rounded: gemv, nothing but the result. left, a weight is (code - 2^(b-1)) * s + m' in the 16-bit type, with m' = m + 2^(b-1) s
rounded once a group; centred codes keep m' small. dequantize, the weight once. Sums are float32 everywhere.

Source: weights as left operand, decoded in its registers, after Marlin (Frantar et al. 2024, arXiv:2408.11743).
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

from autoeff.kernels import dequantize_wq, split_k, tuned
from autoeff.kernels.dequantize_wq import PLANES, UNIT

try:
    import triton
    import triton.language as tl

    from autoeff.kernels.dequantize_wq import load_fields
except ImportError:
    triton = None

__all__ = ["CpuWeight", "Weight", "flops", "hopper_cases", "launch", "linear", "moved_bytes", "reference"]


@dataclass(frozen=True)
class Weight:
    """A packed weight [N, K], checked once.

    Attributes:
        planes: Bit planes by name, as `dequantize_wq.pack` returns them.
        scale: fp16 [N, ceil(k / group)].
        minimum: fp16 of the same shape; None for symmetric codes.
        bits: One of 2, 3, 4, 6, 8.
        k: Inputs.
        group: Inputs that share a scale, a multiple of 8. Groups that are no multiple of 16 have no `left` kernel and are decoded first.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
    """

    planes: Mapping[str, Tensor]
    scale: Tensor
    minimum: Tensor | None
    bits: int
    k: int
    group: int

    def __post_init__(self) -> None:
        dequantize_wq.check(self.planes, self.scale, self.minimum, self.bits, self.k, self.group)

    @property
    def n(self) -> int:
        return self.scale.shape[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in float16 or bfloat16."""
        return dequantize_wq.dequantize(self.planes, self.scale, self.minimum, self.bits, self.k, self.group, dtype)


class CpuWeight:
    """A packed weight once more, as torch's int4 kernel for CPUs reads it. It takes bfloat16 activations; made for few rows.

    2, 3 and 4 bits are served from 4-bit fields (0.5 B a weight), 6 and 8 bits as 16 * high + low from two of them (1 B a weight, each
    activation read twice): what is narrower than a field is not faster here. Time grows with M: above 8 rows a dense bfloat16 product wins.

    Rounded to bfloat16, beside the result: the scale, and the minimum after the codes are centred (for 6 and 8 bits as the sum of two
    bfloat16 numbers). The scale's rounding moves all weights of a group together by at most 2^-8 of their distance from the centre.

    Args:
        weight: On the CPU; its group must be a multiple of 32.

    Raises:
        ValueError: Another device, or a group that is no multiple of 32.
    """

    _GROUPS = (256, 128, 64, 32)  # those the kernel knows

    def __init__(self, weight: Weight) -> None:
        if weight.scale.device.type != "cpu":
            raise ValueError(f"CpuWeight needs a weight on the CPU: got {weight.scale.device}")
        if weight.group % 32:
            raise ValueError(f"the packed CPU kernel needs a group that is a multiple of 32: got {weight.group}; use linear(x, weight)")
        self.n, self.k = weight.n, weight.k
        self._halves = 1 if weight.bits <= 4 else 2
        # a group may stand as several smaller ones with the same scale; the last one is filled up with inputs of 0
        self._group = next((g for g in self._GROUPS if weight.group % g == 0 and weight.k % g == 0), 32)
        k, n = -(-self.k // self._group) * self._group, -(-self.n // 16) * 16
        self._missing = k - self.k
        self._plain = not self._missing and self._halves == 1 and n == self.n
        bits, scale = weight.bits, weight.scale.float()
        centre = float(1 << bits - 1)
        codes = dequantize_wq.unpack(weight.planes, bits, self.k).int()
        minimum = torch.zeros_like(scale) if weight.minimum is None else weight.minimum.float() + centre * scale
        if self._halves == 1:
            parts = [(codes + (8 - int(centre)), scale, minimum)]
        else:
            codes = codes + (128 - int(centre))
            minimum = minimum + 8 * scale  # the kernel centres the low field too
            rough = minimum.bfloat16().float()
            parts = [(codes >> 4, 16 * scale, rough), (codes & 15, scale, minimum - rough)]
        fields = torch.cat([pad(field, (0, self._missing, 0, n - self.n)) for field, _, _ in parts], 1)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields.contiguous(), 1)
        tables = [torch.stack([self._spread(step, weight.group, k), self._spread(zero, weight.group, k)], -1) for _, step, zero in parts]
        table = pad(torch.cat(tables, 1).transpose(0, 1), (0, 0, 0, n - self.n))
        self._scale_and_zero = table.to(torch.bfloat16).contiguous()  # [groups, N, 2]

    @property
    def nbytes(self) -> int:
        return int(self._packed.nbytes + self._scale_and_zero.nbytes)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., N] in bfloat16 from x [..., K] in bfloat16.

        Raises:
            ValueError: Another dtype or another K.
        """
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.k:
            raise ValueError(f"x must be bfloat16 [..., {self.k}]: got {x.dtype} {tuple(x.shape)}")
        if self._plain and x.dim() == 2:  # no view, no slice: at small sizes each costs as much as the product
            y = torch._weight_int4pack_mm_for_cpu(x.contiguous(), self._packed, self._group, self._scale_and_zero)
            return y if bias is None else y + bias
        rows = x.reshape(-1, self.k)
        if self._missing:
            rows = pad(rows, (0, self._missing))
        if self._halves == 2:
            rows = torch.cat([rows, rows], 1)
        y = torch._weight_int4pack_mm_for_cpu(rows.contiguous(), self._packed, self._group, self._scale_and_zero)[:, : self.n]
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], self.n)

    def _spread(self, table: Tensor, group: int, k: int) -> Tensor:
        """[N, groups of the weight] as [N, groups of the kernel]."""
        return table.repeat_interleave(group // self._group, 1)[:, : k // self._group]


def moved_bytes(m: int, n: int, k: int, bits: int, group: int, symmetric: bool) -> int:
    """Bytes that the product reads and writes at the least: packed weight, 16-bit x and y."""
    return dequantize_wq.packed_bytes(n, k, bits, group, symmetric) + 2 * m * (n + k)


def flops(m: int, n: int, k: int) -> int:
    """Floating-point operations of the product itself."""
    return 2 * m * n * k


def reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The exact result, float64 [..., N]: the product with the exact values of the packed weight."""
    exact = dequantize_wq.reference(weight.planes, weight.scale, weight.minimum, weight.bits, weight.k, weight.group)
    y = x.cpu().double() @ exact.T
    return y if bias is None else y + bias.cpu().double()


def linear(x: Tensor, weight: Weight | CpuWeight, bias: Tensor | None = None) -> Tensor:
    """X W^T + b, [..., N] in the dtype of x: on CUDA by Triton, on the CPU by torch operations.

    Args:
        x: float16 or bfloat16 [..., K]; a `CpuWeight` takes bfloat16 only.
        weight: On the device of x.
        bias: [N] in the dtype of x.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    if isinstance(weight, CpuWeight):
        return weight(x, bias)
    _check(x, weight, bias)
    if not x.is_cuda:
        return dense_linear(x, weight.dense(x.dtype), bias)
    rows = x.reshape(-1, weight.k).contiguous()
    config = tuned.nearest("linear_wq", rows.shape[0], weight.n, weight.k, x.device)
    if config["kernel"] == "dequantize" or (config["kernel"] == "left" and weight.group % 16):
        return dense_linear(x, weight.dense(x.dtype), bias)
    y = torch.empty(rows.shape[0], weight.n, dtype=x.dtype, device=x.device)
    launch(rows, weight, bias, y, config)
    return y.view(*x.shape[:-1], weight.n)


def launch(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]) -> None:
    """Runs a Triton kernel, `config["kernel"]` of gemv and left, from contiguous x [M, K] into y [M, N].

    Raises:
        ValueError: As in `linear`.
        RuntimeError: Triton is not installed.
    """
    _check(x, weight, bias)
    split_k.check_output(x, y, weight.n)
    split_k.launch("low-bit weights", y, bias, config.get("splits", 1), lambda added, to: _arguments(x, weight, added, to, config))


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every width x dtype x committed configuration for `autoeff.kernels.compile`."""
    for config, bits, dtype in product(tuned.configurations("linear_wq"), PLANES, (torch.float16, torch.bfloat16)):
        if config["kernel"] == "dequantize":
            continue
        m, n, k, group = config["m"], config["n"], config["k"], 128
        planes = {f"plane{p}": torch.empty(n, k * p // 8, dtype=torch.uint8, device="meta") for p in PLANES[bits]}
        scale = torch.empty(n, k // group, dtype=torch.float16, device="meta")
        x = torch.empty(m, k, dtype=dtype, device="meta")
        splits = config.get("splits", 1)
        y = torch.empty(m, n, dtype=dtype, device="meta") if splits == 1 else torch.empty(splits, m, n, device="meta")
        label = f"{bits} bit, {dtype}; {tuned.label(config)}"
        tensor_cores = config.get("block_n", 0) >= 64
        yield (
            f"linear_wq {config['kernel']}",
            label,
            *_arguments(x, Weight(planes, scale, scale, bits, k, group), None, y, config),
            tensor_cores,
        )


def _check(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16) or x.shape[-1] != weight.k or x.device != weight.scale.device:
        raise ValueError(
            f"x must be float16 or bfloat16 [..., {weight.k}] on {weight.scale.device}: got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    if bias is not None and (tuple(bias.shape) != (weight.n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias must be {x.dtype} {(weight.n,)} on {x.device}: got {bias.dtype} {tuple(bias.shape)} on {bias.device}")


def _arguments(
    x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Kernel, grid, positional arguments and constants of a launch; y is [splits, M, N] where K is split."""
    words, constants = dequantize_wq.words_of(weight.planes, weight.bits, weight.k)
    (m, k), n, groups = x.shape, weight.n, weight.scale.shape[1]
    minimum = weight.scale if weight.minimum is None else weight.minimum
    block_u = config["block_k"] // UNIT
    if config["kernel"] == "left":  # a step stays inside a group
        block_u = min(block_u, _powers_of_two(weight.group) // UNIT)
    constants |= {
        "GROUP_U": weight.group // UNIT, "ZERO": 1 << weight.bits - 1, "MINIMUM": weight.minimum is not None, "BIAS": bias is not None,
        "BLOCK_N": config["block_n"], "BLOCK_U": block_u, "num_warps": config["warps"],
    }  # fmt: skip
    tensors = (x, *words, weight.scale, minimum, y if bias is None else bias, y)
    if config["kernel"] == "gemv":
        if m > 4:
            raise ValueError(f"gemv takes at most 4 rows: got {m}")
        return _gemv_kernel, (triton.cdiv(n, config["block_n"]),), (*tensors, n, k, -(-k // UNIT), groups), constants | {"M": m}
    splits = config.get("splits", 1)
    if constants["WHOLE"] and weight.bits == 8:
        words_8 = words[0].view(torch.int32)
        tensors = (x, words_8, words_8, *tensors[3:])
    if block_u < 2:
        raise ValueError(f"left needs a group that is a multiple of 16: got {weight.group}")
    steps = triton.cdiv(triton.cdiv(k, block_u * UNIT), splits)
    constants["WORDS_8"] = constants["WHOLE"] and weight.bits == 8
    constants |= {"BLOCK_M": config["block_m"], "CODES_16": weight.bits < 8 or x.dtype == torch.float16, "num_stages": config["stages"]}
    grid = (triton.cdiv(n, config["block_n"]), triton.cdiv(m, config["block_m"]), splits)
    return _left_kernel, grid, (*tensors, _eight(x.device), m, n, k, -(-k // UNIT), groups, steps), constants


def _powers_of_two(number: int) -> int:
    """The greatest power of two that divides it."""
    return number & -number


@cache
def _eight(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.int32, device=device)


if triton is not None:

    @triton.jit
    def _load_codes(  # type: ignore[no-untyped-def]
        low, high, row, unit, mask, inside, j, k, units, LOW_P: tl.constexpr, HIGH_P: tl.constexpr, WHOLE: tl.constexpr
    ):  # fmt: skip
        code = load_fields(low, row, unit, mask, inside, j, k, units, LOW_P, WHOLE)
        if HIGH_P:
            code = code | (load_fields(high, row, unit, mask, inside, j, k, units, HIGH_P, WHOLE) << LOW_P)
        return code

    @triton.jit
    def _gemv_kernel(  # type: ignore[no-untyped-def]
        x, low, high, scale, minimum, bias, y, n, k, units, groups,
        LOW_P: tl.constexpr, HIGH_P: tl.constexpr, WHOLE: tl.constexpr, GROUP_U: tl.constexpr, ZERO: tl.constexpr,
        MINIMUM: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64)  # row * k may pass 2^31
        # a tile of sums for each row of x; one reduction at the end instead of one a step
        sum0 = tl.zeros((BLOCK_N, BLOCK_U, 8), tl.float32)
        sum1 = sum0
        sum2 = sum0
        sum3 = sum0
        j = tl.arange(0, 8)[None, None, :]
        for start in range(0, units, BLOCK_U):
            unit = start + tl.arange(0, BLOCK_U)[None, :]
            mask = (row < n) & (unit < units)
            column = (unit * 8)[:, :, None] + j
            inside = mask[:, :, None] & (column < k)
            code = _load_codes(low, high, row, unit, mask, inside, j, k, units, LOW_P, HIGH_P, WHOLE)
            at = row * groups + unit // GROUP_U
            step = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
            # 2^23 + code as a float32, without an integer conversion
            value = ((code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)) * step
            if MINIMUM:
                value += tl.load(minimum + at, mask=mask, other=0.0).to(tl.float32)[:, :, None] + ZERO * step
            sum0 += value * tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)
            if M > 1:
                sum1 += value * tl.load(x + k + column, mask=column < k, other=0.0).to(tl.float32)
            if M > 2:
                sum2 += value * tl.load(x + 2 * k + column, mask=column < k, other=0.0).to(tl.float32)
            if M > 3:
                sum3 += value * tl.load(x + 3 * k + column, mask=column < k, other=0.0).to(tl.float32)
        at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        extra = tl.zeros((BLOCK_N,), tl.float32)
        if BIAS:
            extra = tl.load(bias + at, mask=at < n, other=0.0).to(tl.float32)
        dtype = y.dtype.element_ty
        tl.store(y + at, (tl.sum(tl.sum(sum0, 2), 1) + extra).to(dtype), mask=at < n)
        if M > 1:
            tl.store(y + n + at, (tl.sum(tl.sum(sum1, 2), 1) + extra).to(dtype), mask=at < n)
        if M > 2:
            tl.store(y + 2 * n + at, (tl.sum(tl.sum(sum2, 2), 1) + extra).to(dtype), mask=at < n)
        if M > 3:
            tl.store(y + 3 * n + at, (tl.sum(tl.sum(sum3, 2), 1) + extra).to(dtype), mask=at < n)

    @triton.jit
    def _left_kernel(  # type: ignore[no-untyped-def]
        x, low, high, scale, minimum, bias, y, eight, m, n, k, units, groups, steps,
        LOW_P: tl.constexpr, HIGH_P: tl.constexpr, WHOLE: tl.constexpr, GROUP_U: tl.constexpr, ZERO: tl.constexpr,
        MINIMUM: tl.constexpr, BIAS: tl.constexpr, CODES_16: tl.constexpr, WORDS_8: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = x.dtype.element_ty
        at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = at_n[:, None].to(tl.int64)
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # 0 .. 7 from memory: the compiler moves the operand layout of the tensor core up to loads but not past a `tl.arange`; with one
        # in the way the unpacked tile goes through shared memory and each thread loads 32 scales (158 registers instead of 48)
        j = tl.load(eight + tl.arange(0, 8))[None, None, :]
        quad = tl.arange(0, BLOCK_U * 2)[None, :]
        first = tl.program_id(2) * steps
        for number in range(first, tl.minimum(first + steps, (units + BLOCK_U - 1) // BLOCK_U)):
            start = number * BLOCK_U
            unit = start + tl.arange(0, BLOCK_U)[None, :]
            mask = (row < n) & (unit < units)
            inside = mask[:, :, None] & ((unit * 8)[:, :, None] + tl.arange(0, 8)[None, None, :] < k)
            if WORDS_8:  # four codes a word: single bytes cannot be copied to shared memory ahead of time
                word = tl.load(low + (row * (units * 2) + start * 2 + quad), mask=(row < n) & (start * 2 + quad < units * 2), other=0)
                code = (word[:, :, None] >> 8 * tl.load(eight + tl.arange(0, 4))[None, None, :]) & 255
            else:
                code = _load_codes(low, high, row, unit, mask, inside, j, k, units, LOW_P, HIGH_P, WHOLE)
            # one group a step; loaded flat, since in the shape of the units each thread would load 32 rows
            at = at_n.to(tl.int64) * groups + start // GROUP_U
            step = tl.load(scale + at, mask=at_n < n, other=0.0)
            if not CODES_16:  # 8 bits do not fit beside the exponent of bfloat16
                centred = (code - ZERO).to(dtype)
            elif dtype == tl.float16:
                centred = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
            else:
                centred = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (128.0 + ZERO)
            value = tl.reshape(centred.to(dtype), (BLOCK_N, BLOCK_U * 8)) * step.to(dtype)[:, None]
            if MINIMUM:
                shift = tl.load(minimum + at, mask=at_n < n, other=0.0)
                value += (shift.to(tl.float32) + ZERO * step.to(tl.float32)).to(dtype)[:, None]
            column = start * 8 + tl.arange(0, BLOCK_U * 8)
            at_x = token.to(tl.int64)[None, :] * k + column[:, None]
            # x is 0 past K, so what the weight holds there does not count
            right = tl.load(x + at_x, mask=(column[:, None] < k) & (token[None, :] < m), other=0.0)
            total = tl.dot(value, right, total)
        if BIAS:
            total += tl.load(bias + at_n, mask=at_n < n, other=0.0).to(tl.float32)[:, None]
        at_y = (tl.program_id(2).to(tl.int64) * m + token[None, :]) * n + at_n[:, None]
        tl.store(y + at_y, total.to(y.dtype.element_ty), mask=(at_n[:, None] < n) & (token[None, :] < m))
