"""Low-bit weights: how they are packed, and how they become 16-bit weights again.

A weight [N, K] of b bits is kept as codes 0 .. 2^b - 1 in one or two *bit planes* (uint8 tensors), with one fp16 `scale` per
row and group of `group` inputs [N, ceil(K / group)] and, if asymmetric, one fp16 `minimum` of the same shape:

    asymmetric   value = code * scale + minimum           code in 0 .. 2^b - 1
    symmetric    value = (code - 2^(b-1)) * scale         code in 0 .. 2^b - 1, so -2^(b-1) .. 2^(b-1) - 1 times the scale

Planes: 2, 4 and 8 bits are one plane of that width; 3 = 2 + 1 and 6 = 4 + 2, low bits in the wider plane, so that no field
straddles a word and a weight takes exactly b bits. Each row is padded to a multiple of 8 values (with code 0): a *unit* of 8
values is p bytes of a plane of width p, and a plane is [N, ceil(K / 8) * p].

Order inside a unit, for p in 1, 2, 4: the unit is a little-endian integer of 8p bits, whose half h in {0, 1} holds at bit
4p * h + p * s the value 2s + h. For p = 8 byte j is value j. Hence, with the halves of a unit moved 16 bits apart (for p = 4 they
are), `(unit >> p * s) & (mask * 0x00010001) | 0x64006400` is the fp16 pair (1024 + value 2s, 1024 + value 2s + 1): neighbours in
one register, without an integer conversion.

Every path computes in float32 and rounds once to the 16-bit result. A code has at most 8 significant bits and an fp16 number 11, so
the product is exact in float32 (24), a fused and an unfused multiply-add agree, and all paths give the same bits. They equal the
rounded exact value, unless the sum itself needs more than 24 bits and falls that close to the middle of two neighbours (then
the two roundings may take the other one, 1 ulp away). Symmetric values have no sum and are always the rounded exact value.

Source: layout and exponent trick after Kim et al. 2022 (arXiv:2211.10017); planes for 6 bits as in FP6-LLM (arXiv:2401.14112).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS; packing, the reference and the torch path need none
    triton = None

__all__ = [
    "PLANES", "UNIT", "dequantize", "flops", "hopper_cases", "launch", "moved_bytes", "pack", "packed_bytes", "reference", "unpack",
]  # fmt: skip

PLANES: Mapping[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""Plane widths by bits, low bits first."""
UNIT = 8
"""Values that share whole bytes in every plane; a group is a multiple of it."""

_UNIT_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # one unit of a plane as one number
_BLOCK_N, _BLOCK_U, _WARPS = 8, 32, 4  # 2,048 values a program, 16 a thread: whole units, 32-byte stores


def packed_bytes(n: int, k: int, bits: int, group: int, symmetric: bool) -> int:
    """Bytes of the packed tensors of a weight [n, k]: planes with row padding, scales and minima."""
    return n * (-(-k // UNIT) * bits + -(-k // group) * (2 if symmetric else 4))


def moved_bytes(n: int, k: int, bits: int, group: int, symmetric: bool) -> int:
    """Bytes that `dequantize` reads and writes at the least."""
    return packed_bytes(n, k, bits, group, symmetric) + 2 * n * k


def flops(n: int, k: int) -> int:
    """Floating-point operations of `dequantize`: one multiply-add per weight."""
    return 2 * n * k


def pack(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """The bit planes of `codes`, by name (`plane<width>`).

    Args:
        codes: uint8 [N, K], each below 2^bits.
        bits: One of 2, 3, 4, 6, 8.

    Raises:
        ValueError: Another dtype, rank or width, or a code that does not fit.
    """
    widths = _widths(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be uint8 [N, K]: got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes must be below 2^{bits} = {1 << bits}: got {int(codes.max())}")
    padded = pad(codes, (0, -codes.shape[1] % UNIT)).contiguous()
    if widths == (8,):
        return {"plane8": padded}
    units = padded.view(torch.int64)
    planes: dict[str, Tensor] = {}
    base = 0
    for p in widths:
        even, odd = (_gathered(units >> (base + 8 * h), p) for h in (0, 1))
        planes[f"plane{p}"] = (even | odd << 4 * p).to(_UNIT_DTYPE[p]).view(torch.uint8)
        base += p
    return planes


def unpack(planes: Mapping[str, Tensor], bits: int, k: int) -> Tensor:
    """The codes in `planes` as uint8 [N, k]; inverse of `pack`."""
    widths = _widths(bits)
    if widths == (8,):
        return planes["plane8"][:, :k]
    parts: list[Tensor] = []
    base = 0
    for p in widths:
        units = planes[f"plane{p}"].view(_UNIT_DTYPE[p]).to(torch.int64)
        parts.append((_spread(units, p) | _spread(units >> 4 * p, p) << 8) << base)
        base += p
    return reduce(torch.bitwise_or, parts).view(torch.uint8)[:, :k]


def reference(planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int) -> Tensor:
    """The exact values, float64 [N, k]: the definition, bit by bit as the module's docstring words it."""
    j = torch.arange(k)
    codes = torch.zeros(scale.shape[0], k, dtype=torch.int64)
    base = 0
    for p in _widths(bits):
        bit = p * (j % 8) if p == 8 else 4 * p * (j % 2) + p * (j % 8 // 2)
        fields = planes[f"plane{p}"].cpu()[:, j // 8 * p + bit // 8].to(torch.int64) >> bit % 8
        codes |= (fields & (1 << p) - 1) << base
        base += p
    steps = scale.cpu().double()[:, j // group]
    if minimum is None:
        return (codes - (1 << bits - 1)) * steps
    return codes * steps + minimum.cpu().double()[:, j // group]


def dequantize(
    planes: Mapping[str, Tensor],
    scale: Tensor,
    minimum: Tensor | None,
    bits: int,
    k: int,
    group: int,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The weight [N, k] in `out_dtype`; on CUDA by the Triton kernel, elsewhere by torch operations.

    Args:
        planes: Bit planes by name, as `pack` returns them; other entries are ignored.
        scale: fp16 [N, ceil(k / group)].
        minimum: fp16 of the same shape; None for symmetric codes.
        bits: One of 2, 3, 4, 6, 8.
        k: Inputs of the linear.
        group: Inputs that share a scale, a multiple of 8. The last group of a row may be shorter.
        out_dtype: float16 or bfloat16.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(planes, scale, minimum, bits, k, group, out_dtype)
    if scale.is_cuda:
        out = torch.empty(scale.shape[0], k, dtype=out_dtype, device=scale.device)
        launch(planes, scale, minimum, bits, k, group, out)
        return out
    n, groups = scale.shape
    codes = pad(unpack(planes, bits, k), (0, groups * group - k)).view(n, groups, group)
    if minimum is None:
        values = (codes.float() - (1 << bits - 1)).mul_(scale.float()[:, :, None])
    else:
        values = codes.float().mul_(scale.float()[:, :, None]).add_(minimum.float()[:, :, None])
    return values.to(out_dtype).view(n, groups * group)[:, :k].contiguous()


def launch(
    planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int, out: Tensor
) -> None:
    """Runs the Triton kernel into `out` [N, k]; arguments as in `dequantize`.

    Raises:
        ValueError: As in `dequantize`.
        RuntimeError: Triton is not installed.
    """
    _check(planes, scale, minimum, bits, k, group, out.dtype)
    if tuple(out.shape) != (scale.shape[0], k) or out.device != scale.device or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {(scale.shape[0], k)} on {scale.device}: got {tuple(out.shape)} on {out.device}")
    if triton is None:
        raise RuntimeError("low-bit weights on a GPU need Triton, which is not installed: pip install 'triton>=3.6'")
    grid, arguments, options = _arguments(planes, scale, minimum, bits, k, group, out)
    with torch.cuda.device(out.get_device()):  # on the CPU (-1) it does nothing
        _dequantize_kernel[grid](*arguments, **options)


def hopper_cases() -> Iterator[tuple[str, Any, tuple[int, int], tuple[Any, ...], dict[str, Any]]]:
    """Every variant of the kernel for `autoeff.kernels.compile`: label, kernel, grid, arguments on the meta device, options."""
    n, group = 1024, 64
    for bits, widths in PLANES.items():
        # the last one has a ragged group and rows that are not 16-byte aligned
        for k, dtype, symmetric in (*product((4096,), (torch.float16, torch.bfloat16), (False, True)), (4100, torch.float16, False)):
            planes = {f"plane{p}": torch.empty(n, -(-k // UNIT) * p, dtype=torch.uint8, device="meta") for p in widths}
            scale = torch.empty(n, -(-k // group), dtype=torch.float16, device="meta")
            out = torch.empty(n, k, dtype=dtype, device="meta")
            label = f"dequantize_wq {bits} bit, {'symmetric' if symmetric else 'asymmetric'}, {dtype}, K = {k}"
            yield label, _dequantize_kernel, *_arguments(planes, scale, None if symmetric else scale, bits, k, group, out)


def _widths(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise ValueError(f"no packing of {bits} bits; allowed: {', '.join(map(str, PLANES))}")
    return PLANES[bits]


def _gathered(units: Tensor, p: int) -> Tensor:
    """Moves the low p bits of bytes 0, 2, 4, 6 of each int64 next to each other."""
    units = units & ((1 << p) - 1) * 0x0001000100010001
    units = (units | units >> 16 - p) & ((1 << 2 * p) - 1) * 0x0000000100000001
    return (units | units >> 32 - 2 * p) & (1 << 4 * p) - 1


def _spread(units: Tensor, p: int) -> Tensor:
    """Inverse of `_gathered`; bits above the low 4p are dropped."""
    units = units & (1 << 4 * p) - 1
    units = (units | units << 32 - 2 * p) & ((1 << 2 * p) - 1) * 0x0000000100000001
    return (units | units << 16 - p) & ((1 << p) - 1) * 0x0001000100010001


def _check(
    planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int, out_dtype: torch.dtype
) -> None:
    if out_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"out_dtype must be float16 or bfloat16: got {out_dtype}")
    if group < UNIT or group % UNIT:
        raise ValueError(f"group must be a positive multiple of {UNIT}: got {group}")
    n = scale.shape[0]
    expected = {"scale": ((n, -(-k // group)), torch.float16, scale)}
    if minimum is not None:
        expected["minimum"] = ((n, -(-k // group)), torch.float16, minimum)
    for p in _widths(bits):
        if f"plane{p}" not in planes:
            raise ValueError(f"{bits} bits need plane{p}; got {', '.join(planes) or 'nothing'}")
        expected[f"plane{p}"] = ((n, -(-k // UNIT) * p), torch.uint8, planes[f"plane{p}"])
    for name, (shape, dtype, tensor) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != scale.device or not tensor.is_contiguous():
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{'' if tensor.is_contiguous() else ', strided'}"
            raise ValueError(f"{name} must be a contiguous {dtype} {shape} on {scale.device}: got {found}")


def _arguments(
    planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int, out: Tensor
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, positional arguments and constants of a launch."""
    n, units = out.shape[0], -(-k // UNIT)
    words = [planes[f"plane{p}"] if p == 8 else planes[f"plane{p}"].view(_UNIT_DTYPE[p]) for p in PLANES[bits]]
    high_p = PLANES[bits][1] if len(words) == 2 else 0
    arguments = (words[0], words[-1], scale, scale if minimum is None else minimum, out, n, k, units, scale.shape[1])
    constants = {
        "LOW_P": PLANES[bits][0], "HIGH_P": high_p, "GROUP_U": group // UNIT, "ZERO": 1 << bits - 1 if minimum is None else 0,
        "BLOCK_N": _BLOCK_N, "BLOCK_U": _BLOCK_U, "num_warps": _WARPS,
    }  # fmt: skip
    return (triton.cdiv(n, _BLOCK_N), triton.cdiv(units, _BLOCK_U)), arguments, constants


if triton is not None:

    @triton.jit
    def _load_fields(plane, row, unit, mask, units, P: tl.constexpr):  # type: ignore[no-untyped-def]
        """The fields of width P of a tile of units, int32 [BLOCK_N, BLOCK_U, 8] in the order of values."""
        j = tl.arange(0, 8)[None, None, :]
        at = row * units + unit
        if P == 8:
            return tl.load(plane + (at[:, :, None] * 8 + j), mask=mask[:, :, None], other=0).to(tl.int32)
        # each word is read once and shifted eight ways: repeating the address instead would repeat the load
        word = tl.load(plane + at, mask=mask, other=0).to(tl.int32)
        return (word[:, :, None] >> (j % 2 * (4 * P) + j // 2 * P)) & ((1 << P) - 1)

    @triton.jit
    def _dequantize_kernel(  # type: ignore[no-untyped-def]
        low, high, scale, minimum, out, n, k, units, groups,
        LOW_P: tl.constexpr, HIGH_P: tl.constexpr, GROUP_U: tl.constexpr, ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64)  # row * k may pass 2^31
        unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :]
        mask = (row < n) & (unit < units)
        code = _load_fields(low, row, unit, mask, units, LOW_P)
        if HIGH_P:
            code = code | (_load_fields(high, row, unit, mask, units, HIGH_P) << LOW_P)
        at = row * groups + unit // GROUP_U
        step = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        if ZERO:
            value = (code - ZERO).to(tl.float32) * step
        else:
            value = code.to(tl.float32) * step + tl.load(minimum + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        column = (unit * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
        tl.store(out + (row[:, :, None] * k + column), value.to(out.dtype.element_ty), mask=mask[:, :, None] & (column < k))
