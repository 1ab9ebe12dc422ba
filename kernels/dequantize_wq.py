"""Low-bit weights: how they are packed, and how they become 16-bit weights again.

A weight [N, K] of b bits is kept as codes 0 .. 2^b - 1 in one or two *bit planes* (uint8 tensors), with one fp16 `scale` per
row and group of `group` inputs [N, ceil(K / group)] and, if asymmetric, one fp16 `minimum` of the same shape:

    asymmetric   value = code * scale + minimum           code in 0 .. 2^b - 1
    symmetric    value = (code - 2^(b-1)) * scale         code in 0 .. 2^b - 1, so -2^(b-1) .. 2^(b-1) - 1 times the scale

Planes: 2, 4 and 8 bits are one plane of that width; 3 = 2 + 1 and 6 = 4 + 2, low bits in the wider plane, so that no field
straddles a byte. In a plane of width p, value j of a row is bits p * j .. p * j + p - 1 of the row's little-endian bit stream. A row
takes whole bytes: a plane is [N, ceil(K * p / 8)], and unused bits of the last byte are 0.

Eight values, a *unit*, are p bytes. Rows of whole units (K a multiple of 8) are read a unit at a time; other rows begin anywhere
and are read byte by byte. In a 32-bit word `(word >> p * j) & (mask * 0x00010001) | 0x64006400` is the fp16 pair (1024 + value j,
1024 + value j + 16 / p): two values in one register, without an integer conversion.

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
    "PLANES", "UNIT", "check", "dequantize", "flops", "hopper_cases", "launch", "moved_bytes", "pack", "packed_bytes", "reference",
    "unpack", "words_of",
]  # fmt: skip

PLANES: Mapping[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""Plane widths by bits, low bits first."""
UNIT = 8
"""Values that fill whole bytes in every plane; a group is a multiple of it."""

_UNIT_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # one unit of a plane as one number
_BLOCK_N, _BLOCK_U, _WARPS = 8, 32, 4  # 2,048 values a program, 16 a thread: whole units, 32-byte stores


def packed_bytes(n: int, k: int, bits: int, group: int, symmetric: bool) -> int:
    """Bytes of the packed tensors of a weight [n, k]: planes, scales and minima."""
    return n * (sum(_row_bytes(k, p) for p in _widths(bits)) + -(-k // group) * (2 if symmetric else 4))


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
    k = codes.shape[1]
    if widths == (8,):
        return {"plane8": codes.contiguous()}
    units = _whole_units(codes, k, 8).contiguous().view(torch.int64)
    planes: dict[str, Tensor] = {}
    base = 0
    for p in widths:
        words = _gathered(units >> base, p).to(_UNIT_DTYPE[p])
        planes[f"plane{p}"] = words.view(torch.uint8)[:, : _row_bytes(k, p)].contiguous()
        base += p
    return planes


def unpack(planes: Mapping[str, Tensor], bits: int, k: int) -> Tensor:
    """The codes in `planes` as uint8 [N, k]; inverse of `pack`."""
    widths = _widths(bits)
    if widths == (8,):
        return planes["plane8"]
    parts: list[Tensor] = []
    base = 0
    for p in widths:
        words = _whole_units(planes[f"plane{p}"], k, p).view(_UNIT_DTYPE[p])
        parts.append(_spread(words, p) << base)
        base += p
    return reduce(torch.bitwise_or, parts).view(torch.uint8)[:, :k]


def reference(planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int) -> Tensor:
    """The exact values, float64 [N, k]: the definition, bit by bit as the module's docstring words it."""
    j = torch.arange(k)
    codes = torch.zeros(scale.shape[0], k, dtype=torch.int64)
    base = 0
    for p in _widths(bits):
        fields = planes[f"plane{p}"].cpu()[:, p * j // 8].to(torch.int64) >> p * j % 8
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
    _check_out(out_dtype)
    check(planes, scale, minimum, bits, k, group)
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


def launch(planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int, out: Tensor) -> None:
    """Runs the Triton kernel into `out` [N, k]; arguments as in `dequantize`.

    Raises:
        ValueError: As in `dequantize`.
        RuntimeError: Triton is not installed.
    """
    _check_out(out.dtype)
    check(planes, scale, minimum, bits, k, group)
    if tuple(out.shape) != (scale.shape[0], k) or out.device != scale.device or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {(scale.shape[0], k)} on {scale.device}: got {tuple(out.shape)} on {out.device}")
    if triton is None:
        raise RuntimeError("low-bit weights on a GPU need Triton, which is not installed: pip install 'triton>=3.6'")
    grid, arguments, options = _arguments(planes, scale, minimum, bits, k, group, out)
    with torch.cuda.device(out.get_device()):  # on the CPU (-1) it does nothing
        _dequantize_kernel[grid](*arguments, **options)


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every variant for `autoeff.kernels.compile`, in the order of its `Case`."""
    n, group = 1024, 64
    for bits, widths in PLANES.items():
        # the last one has a ragged group and rows that are not whole units
        for k, dtype, symmetric in (*product((4096,), (torch.float16, torch.bfloat16), (False, True)), (4100, torch.float16, False)):
            planes = {f"plane{p}": torch.empty(n, _row_bytes(k, p), dtype=torch.uint8, device="meta") for p in widths}
            scale = torch.empty(n, -(-k // group), dtype=torch.float16, device="meta")
            out = torch.empty(n, k, dtype=dtype, device="meta")
            label = f"{bits} bit, {'symmetric' if symmetric else 'asymmetric'}, {dtype}, K = {k}; one configuration"
            yield (
                "dequantize_wq",
                label,
                _dequantize_kernel,
                *_arguments(planes, scale, None if symmetric else scale, bits, k, group, out),
                False,
            )


def words_of(planes: Mapping[str, Tensor], bits: int, k: int) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The low and the high plane as `load_fields` reads them (the same one twice if there is one), and its constants."""
    whole = k % UNIT == 0
    words = [planes[f"plane{p}"].view(_UNIT_DTYPE.get(p, torch.uint8) if whole else torch.uint8) for p in PLANES[bits]]
    return (words[0], words[-1]), {"LOW_P": PLANES[bits][0], "HIGH_P": PLANES[bits][1] if len(words) == 2 else 0, "WHOLE": whole}


def _widths(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise ValueError(f"no packing of {bits} bits; allowed: {', '.join(map(str, PLANES))}")
    return PLANES[bits]


def _row_bytes(k: int, p: int) -> int:
    return -(-k * p // 8)


def _whole_units(rows: Tensor, k: int, p: int) -> Tensor:
    """Zeros after each row of `k` values of `p` bits, up to whole units."""
    missing = -(-k // UNIT) * p - rows.shape[1]
    return pad(rows, (0, missing)) if missing else rows


def _gathered(units: Tensor, p: int) -> Tensor:
    """Moves the low p bits of the bytes of each int64 next to each other; the other bits are dropped."""
    units = units & ((1 << p) - 1) * 0x0101010101010101
    units = (units | units >> 8 - p) & ((1 << 2 * p) - 1) * 0x0001000100010001
    units = (units | units >> 16 - 2 * p) & ((1 << 4 * p) - 1) * 0x0000000100000001
    return (units | units >> 32 - 4 * p) & (1 << 8 * p) - 1


def _spread(words: Tensor, p: int) -> Tensor:
    """Inverse of `_gathered`."""
    units = words.to(torch.int64) & (1 << 8 * p) - 1  # without the copies of the sign
    units = (units | units << 32 - 4 * p) & ((1 << 4 * p) - 1) * 0x0000000100000001
    units = (units | units << 16 - 2 * p) & ((1 << 2 * p) - 1) * 0x0001000100010001
    return (units | units << 8 - p) & ((1 << p) - 1) * 0x0101010101010101


def _check_out(dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"out_dtype must be float16 or bfloat16: got {dtype}")


def check(planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int) -> None:
    """Raises ValueError where the packed tensors of a weight do not belong together."""
    if group < UNIT or group % UNIT:
        raise ValueError(f"group must be a positive multiple of {UNIT}: got {group}")
    n = scale.shape[0]
    expected = {"scale": ((n, -(-k // group)), torch.float16, scale)}
    if minimum is not None:
        expected["minimum"] = ((n, -(-k // group)), torch.float16, minimum)
    for p in _widths(bits):
        if f"plane{p}" not in planes:
            raise ValueError(f"{bits} bits need plane{p}; got {', '.join(planes) or 'nothing'}")
        expected[f"plane{p}"] = ((n, _row_bytes(k, p)), torch.uint8, planes[f"plane{p}"])
    for name, (shape, dtype, tensor) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != scale.device or not tensor.is_contiguous():
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{'' if tensor.is_contiguous() else ', strided'}"
            raise ValueError(f"{name} must be a contiguous {dtype} {shape} on {scale.device}: got {found}")


def _arguments(
    planes: Mapping[str, Tensor], scale: Tensor, minimum: Tensor | None, bits: int, k: int, group: int, out: Tensor
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, positional arguments and constants of a launch."""
    n, units = out.shape[0], -(-k // UNIT)
    words, constants = words_of(planes, bits, k)
    arguments = (*words, scale, scale if minimum is None else minimum, out, n, k, units, scale.shape[1])
    constants |= {
        "GROUP_U": group // UNIT, "ZERO": 1 << bits - 1 if minimum is None else 0,
        "BLOCK_N": _BLOCK_N, "BLOCK_U": _BLOCK_U, "num_warps": _WARPS,
    }  # fmt: skip
    return (triton.cdiv(n, _BLOCK_N), triton.cdiv(units, _BLOCK_U)), arguments, constants


if triton is not None:

    @triton.jit
    def load_fields(plane, row, unit, mask, inside, j, k, units, P: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
        """The fields of width P of a tile of units, int32 [BLOCK_N, BLOCK_U, 8]; `mask` is true for units, `inside` for values.

        `j` is 0 .. 7 as [1, 1, 8], made by the caller: how the compiler lays out the tile depends on where these numbers come from.
        """
        if P == 8:
            fields = tl.load(plane + ((row * k + unit * 8)[:, :, None] + j), mask=inside, other=0).to(tl.int32)
        else:
            if WHOLE:
                word = tl.load(plane + (row * units + unit), mask=mask, other=0).to(tl.int32)
            else:
                row_bytes = (k * P + 7) // 8
                word = tl.zeros(mask.shape, tl.int32)
                for i in tl.static_range(P):
                    at = unit * P + i
                    byte = tl.load(plane + (row * row_bytes + at), mask=mask & (at < row_bytes), other=0)
                    word |= byte.to(tl.int32) << 8 * i
            # each word is read once and shifted eight ways: repeating the address instead would repeat the load
            fields = (word[:, :, None] >> P * j) & ((1 << P) - 1)
        return fields

    @triton.jit
    def _dequantize_kernel(  # type: ignore[no-untyped-def]
        low, high, scale, minimum, out, n, k, units, groups,
        LOW_P: tl.constexpr, HIGH_P: tl.constexpr, GROUP_U: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64)  # row * k may pass 2^31
        unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :]
        mask = (row < n) & (unit < units)
        j = tl.arange(0, 8)[None, None, :]
        column = (unit * 8)[:, :, None] + j
        inside = mask[:, :, None] & (column < k)
        code = load_fields(low, row, unit, mask, inside, j, k, units, LOW_P, WHOLE)
        if HIGH_P:
            code = code | (load_fields(high, row, unit, mask, inside, j, k, units, HIGH_P, WHOLE) << LOW_P)
        at = row * groups + unit // GROUP_U
        step = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        if ZERO:
            value = (code - ZERO).to(tl.float32) * step
        else:
            value = code.to(tl.float32) * step + tl.load(minimum + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        tl.store(out + (row[:, :, None] * k + column), value.to(out.dtype.element_ty), mask=inside)
