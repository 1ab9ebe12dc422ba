"""Attention of one new token to a cache whose kept length differs by layer and head; 16-bit or packed keys and values, grouped queries.

A cache holds, for each sequence and KV head, room for L tokens; the first `lengths[b, h]` of them are kept (a layer has a cache of its
own). `PackedCache` keeps 8, 4 or 2 bits a number in the planes of `dequantize_wq`, value = code * scale + minimum: keys by channel, with a
scale and a minimum for every `group` tokens; values by token. A 16-bit `recent` cache may stand beside it; both are attended to as one.

On CUDA: one program for each (sequence, KV head, part of the length), then one that joins the parts. The number of parts depends on the
room, not on the lengths, so that a captured graph stays valid; each head cuts its own length evenly, and a part without tokens weighs
nothing. Scales never touch the codes: those of keys go into the query, those of values into the probabilities. Where no token is kept the
result is 0. On the CPU the cache is decoded and goes through torch's attention.

What is rounded to the 16-bit type: probabilities, the query times a key scale, and the result; sums and the softmax are float32.

Source: split over the length, Flash-Decoding (Dao et al. 2023); keys by channel, values by token, KIVI (Liu et al. 2024, arXiv:2402.02750).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from autoeff.kernels import dequantize_wq, tuned

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["BITS", "Cache", "PackedCache", "attention", "flops", "hopper_cases", "launch", "moved_bytes", "pack", "reference"]

BITS = (8, 4, 2)
"""Of packed keys and values."""
_LOG2_E = 1 / 0.6931471805599453


@dataclass(frozen=True)
class Cache:
    """Keys and values in 16 bits.

    Attributes:
        keys: float16 or bfloat16 [B, KV heads, L, D]; what lies past a head's kept length is not read.
        values: Of the same shape and dtype.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the other.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        keys = self.keys
        if keys.dim() != 4 or keys.dtype not in (torch.float16, torch.bfloat16) or not keys.is_contiguous():
            raise ValueError(f"keys must be contiguous float16 or bfloat16 [B, KV heads, L, D]: got {keys.dtype} {tuple(keys.shape)}")
        _belongs("values", self.values, tuple(keys.shape), keys.dtype, keys.device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, room in tokens, head size."""
        b, heads, room, d = self.keys.shape
        return b, heads, room, d

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in `dtype`."""
        return self.keys.to(dtype), self.values.to(dtype)


@dataclass(frozen=True)
class PackedCache:
    """Keys and values in a few bits.

    Attributes:
        keys: uint8 [B, KV heads, L, D * bits / 8].
        key_scale: fp16 [B, KV heads, ceil(L / group), D].
        key_minimum: As `key_scale`.
        values: As `keys`.
        value_scale: fp16 [B, KV heads, L].
        value_minimum: As `value_scale`.
        bits: 8, 4 or 2.
        group: Tokens that share the scales of the keys; a power of two, at least 16.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
    """

    keys: Tensor
    key_scale: Tensor
    key_minimum: Tensor
    values: Tensor
    value_scale: Tensor
    value_minimum: Tensor
    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"no packing of keys and values in {self.bits} bits; allowed: {', '.join(map(str, BITS))}")
        if self.group < 16 or self.group & self.group - 1:
            raise ValueError(f"group must be a power of two, at least 16: got {self.group}")
        b, heads, room, d = self.shape
        if d % 8:
            raise ValueError(f"the head size of a packed cache must be a multiple of 8: got {d}")
        device, half = self.keys.device, torch.float16
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            _belongs(name, tensor, (b, heads, room, d * self.bits // 8), torch.uint8, device)
        for name, tensor in (("key_scale", self.key_scale), ("key_minimum", self.key_minimum)):
            _belongs(name, tensor, (b, heads, -(-room // self.group), d), half, device)
        for name, tensor in (("value_scale", self.value_scale), ("value_minimum", self.value_minimum)):
            _belongs(name, tensor, (b, heads, room), half, device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, room in tokens, head size."""
        b, heads, room, row = self.keys.shape
        return b, heads, room, row * 8 // self.bits

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in `dtype`, rounded once."""
        b, heads, room, d = self.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        parts = []
        for codes in (self.keys, self.values):
            plain = dequantize_wq.unpack({f"plane{self.bits}": codes.view(-1, codes.shape[3])}, self.bits, d)
            parts.append(plain.view(b, heads, room, d).to(wide))
        scale, minimum = (table.to(wide).repeat_interleave(self.group, 2)[:, :, :room] for table in (self.key_scale, self.key_minimum))
        keys = parts[0] * scale + minimum
        values = parts[1] * self.value_scale.to(wide)[..., None] + self.value_minimum.to(wide)[..., None]
        return keys.to(dtype), values.to(dtype)


def pack(cache: Cache, bits: int, group: int = 64) -> PackedCache:
    """The cache rounded to 2^bits even steps between minimum and maximum: keys by channel and `group` tokens, values by token.

    Raises:
        ValueError: As in `PackedCache`.
    """
    b, heads, room, d = cache.shape
    if bits not in BITS or d % 8 or group < 16:
        raise ValueError(f"need 8, 4 or 2 bits, a head size that is a multiple of 8 and a group from 16: got {bits}, {d}, {group}")
    groups = -(-room // group)
    # the last group is filled up with copies of the last token, which move neither minimum nor maximum
    keys = cache.keys.float()
    keys = torch.cat([keys, keys[:, :, -1:].expand(-1, -1, groups * group - room, -1)], 2).view(b, heads, groups, group, d)
    key_codes, key_scale, key_minimum = _even_steps(keys, 3, bits)
    value_codes, value_scale, value_minimum = _even_steps(cache.values.float(), 3, bits)
    planes = [
        dequantize_wq.pack(codes.reshape(-1, d), bits)[f"plane{bits}"].view(b, heads, room, -1)
        for codes in (key_codes.view(b, heads, groups * group, d)[:, :, :room], value_codes)
    ]
    tables = [table.contiguous() for table in (key_scale[:, :, :, 0], key_minimum[:, :, :, 0], value_scale[..., 0], value_minimum[..., 0])]
    return PackedCache(planes[0], tables[0], tables[1], planes[1], tables[2], tables[3], bits, group)


def moved_bytes(tokens: int, sequences: int, heads: int, d: int, bits: int = 16, group: int = 64) -> int:
    """Bytes read and written at the least: `tokens` kept tokens (summed over sequences and KV heads), 16-bit queries and results.

    A packed cache adds two fp16 tables: D / group numbers a token for keys, one for values.
    """
    numbers = tokens * d * 2 * bits // 8
    tables = 0 if bits == 16 else 4 * (-(-tokens // group) * d + tokens)
    return numbers + tables + 2 * 2 * sequences * heads * d


def flops(tokens: int, queries: int, d: int) -> int:
    """Floating-point operations of both products: `queries` query heads share each of the kept `tokens`."""
    return 4 * tokens * queries * d


def reference(
    q: Tensor, cache: Cache | PackedCache, lengths: Tensor, scale: float, recent: Cache | None = None, recent_lengths: Tensor | None = None
) -> Tensor:
    """The exact result, float64 [B, heads, D], head by head over the kept tokens; arguments as in `attention`."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    parts = [(cache.dense(torch.float64), lengths)]
    if recent is not None and recent_lengths is not None:
        parts.append((recent.dense(torch.float64), recent_lengths))
    queries = q.shape[1] // cache.shape[1]
    for b, head in product(range(q.shape[0]), range(q.shape[1])):
        kv = head // queries
        keys, values = (torch.cat([pair[i][b, kv, : int(kept[b, kv])].cpu() for pair, kept in parts]) for i in (0, 1))
        if len(keys):
            out[b, head] = torch.softmax(keys @ q[b, head].cpu().double() * scale, 0) @ values
    return out


def attention(
    q: Tensor,
    cache: Cache | PackedCache,
    lengths: Tensor,
    scale: float | None = None,
    recent: Cache | None = None,
    recent_lengths: Tensor | None = None,
) -> Tensor:
    """What one new token of each sequence takes from its kept tokens, [B, heads, D] in the dtype of q.

    Args:
        q: float16 or bfloat16 [B, heads, D]; query heads h * g .. h * g + g - 1 share KV head h.
        cache: On the device of q; a 16-bit one in its dtype.
        lengths: int32 [B, KV heads], kept tokens, 0 .. L. Longer ones are cut to L.
        scale: Of the scores; 1 / sqrt(D) if not given.
        recent: More tokens, in 16 bits, with the same sequences, heads and head size.
        recent_lengths: Theirs; given exactly if `recent` is.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(q, cache, lengths, recent, recent_lengths)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if q.is_cuda:
        b, heads, room, d = cache.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        launch(
            q.contiguous(),
            cache,
            lengths,
            scale,
            recent,
            recent_lengths,
            out,
            tuned.nearest("attention_decode", b * heads, room, d, q.device),
        )
        return out
    keys, values = cache.dense(q.dtype)
    kept = torch.arange(keys.shape[2]) < lengths[..., None]
    if recent is not None and recent_lengths is not None:
        keys, values = torch.cat([keys, recent.keys], 2), torch.cat([values, recent.values], 2)
        kept = torch.cat([kept, torch.arange(recent.shape[2]) < recent_lengths[..., None]], 2)
    queries = q.shape[1] // keys.shape[1]
    # what is not kept may hold anything, and 0 * NaN is NaN
    if not bool(kept.all()):
        keys, values = (torch.where(kept[..., None], tensor, 0.0) for tensor in (keys, values))
    mask = kept.repeat_interleave(queries, 1)
    # torch, too, answers 0 where nothing is kept
    return scaled_dot_product_attention(q[:, :, None], keys, values, mask[:, :, None], scale=scale, enable_gqa=True)[:, :, 0]


def launch(
    q: Tensor,
    cache: Cache | PackedCache,
    lengths: Tensor,
    scale: float,
    recent: Cache | None,
    recent_lengths: Tensor | None,
    out: Tensor,
    config: Mapping[str, Any],
) -> None:
    """Runs the Triton kernels into `out` [B, heads, D]; arguments as in `attention`, q and out contiguous.

    Raises:
        ValueError: As in `attention`.
        RuntimeError: Triton is not installed.
    """
    _check(q, cache, lengths, recent, recent_lengths)
    if out.shape != q.shape or out.dtype != q.dtype or not (q.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"out must be contiguous {q.dtype} {tuple(q.shape)}: got {out.dtype} {tuple(out.shape)}")
    if triton is None:
        raise RuntimeError("decode attention on a GPU needs Triton, which is not installed: pip install 'triton>=3.6'")
    if not out.numel():
        return
    with torch.cuda.device(out.get_device()):  # on the CPU (-1) it does nothing
        for _, kernel, grid, arguments, options in _launches(q, cache, lengths, scale, recent, recent_lengths, out, config):
            kernel[grid](*arguments, **options)


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every cache x dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    half, byte = torch.float16, torch.uint8
    for config, dtype, bits in product(tuned.configurations("attention_decode"), (torch.float16, torch.bfloat16), (16, *BITS)):
        b, heads, room, d = 1, config["m"], config["n"], config["k"]
        if bits == 16:
            cache: Cache | PackedCache = Cache(*(meta(b, heads, room, d, dtype=dtype) for _ in range(2)))
        else:
            codes, table, column = (b, heads, room, d * bits // 8), (b, heads, -(-room // 64), d), (b, heads, room)
            keys, scales, values, steps = (
                meta(*codes, dtype=byte),
                meta(*table, dtype=half),
                meta(*codes, dtype=byte),
                meta(*column, dtype=half),
            )
            cache = PackedCache(keys, scales, scales, values, steps, steps, bits, 64)
        q, lengths = meta(b, heads * 4, d, dtype=dtype), meta(b, heads, dtype=torch.int32)
        for name, *case in _launches(q, cache, lengths, 1.0, None, None, q, config):
            if name == "part" or bits == 16:
                yield f"attention_decode {name}", f"{bits if name == 'part' else 32} bit, {dtype}; {tuned.label(config)}", *case, False


def _belongs(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{'' if tensor.is_contiguous() else ', strided'}"
        raise ValueError(f"{name} must be a contiguous {dtype} {shape} on {device}: got {found}")


def _check(q: Tensor, cache: Cache | PackedCache, lengths: Tensor, recent: Cache | None, recent_lengths: Tensor | None) -> None:
    b, heads, _, d = cache.shape
    if q.dtype not in (torch.float16, torch.bfloat16) or q.dim() != 3 or (q.shape[0], q.shape[2]) != (b, d) or q.shape[1] % heads:
        raise ValueError(f"q must be float16 or bfloat16 [{b}, multiple of {heads}, {d}]: got {q.dtype} {tuple(q.shape)}")
    if (recent is None) != (recent_lengths is None):
        raise ValueError("recent and recent_lengths are given together or not at all")
    for name, part, kept in (("cache", cache, lengths), ("recent", recent, recent_lengths)):
        if part is None or kept is None:
            continue
        if (isinstance(part, Cache) and part.keys.dtype != q.dtype) or part.keys.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is: got {part.keys.dtype} on {part.keys.device}")
        if part.shape[:2] != (b, heads) or part.shape[3] != d:
            raise ValueError(f"{name} must be [{b}, {heads}, any, {d}]: got {part.shape}")
        _belongs("lengths" if name == "cache" else "recent_lengths", kept, (b, heads), torch.int32, q.device)


def _even_steps(numbers: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, fp16 scales and fp16 minima along `axis`; codes belong to the rounded tables."""
    low, high = numbers.amin(axis, keepdim=True), numbers.amax(axis, keepdim=True)
    minimum = low.half()
    scale = ((high - minimum.float()) / ((1 << bits) - 1)).clamp_min(2.0**-14).half()
    codes = ((numbers - minimum.float()) / scale.float()).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    return codes, scale, minimum


def _launches(
    q: Tensor,
    cache: Cache | PackedCache,
    lengths: Tensor,
    scale: float,
    recent: Cache | None,
    recent_lengths: Tensor | None,
    out: Tensor,
    config: Mapping[str, Any],
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Name, kernel, grid, positional arguments and constants of each launch, in their order."""
    b, heads, _, d = cache.shape
    queries = q.shape[1] // heads
    blocks = {"BLOCK_D": max(16, triton.next_power_of_2(d))}
    # a window is short: an eighth of the parts
    plan = [(cache, lengths, config["splits"])]
    if recent is not None and recent_lengths is not None:
        plan.append((recent, recent_lengths, max(1, config["splits"] // 8)))
    parts = sum(splits for _, _, splits in plan)
    sums = torch.empty(b, q.shape[1], parts, d, dtype=torch.float32, device=q.device)
    tops, masses = (torch.empty(b, q.shape[1], parts, dtype=torch.float32, device=q.device) for _ in range(2))
    first = 0
    for part, kept, splits in plan:
        packed = isinstance(part, PackedCache)
        bits, group = (part.bits, part.group) if isinstance(part, PackedCache) else (16, 0)
        tensors: tuple[Tensor, ...]
        if isinstance(part, PackedCache):
            word = torch.int16 if bits == 2 else torch.int32
            tensors = (part.keys.view(word), part.values.view(word), part.key_scale, part.key_minimum, part.value_scale, part.value_minimum)
        else:
            tensors = (part.keys, part.values, *[q] * 4)
        room = part.shape[2]
        arguments = (
            q,
            *tensors,
            kept,
            _eight(q.device),
            sums,
            tops,
            masses,
            scale * _LOG2_E,
            heads,
            room,
            d,
            parts,
            first,
            splits,
            -(-room // max(group, 1)),
        )
        constants = {
            "QUERIES": queries, "BLOCK_Q": max(16, triton.next_power_of_2(queries)), "BITS": bits, "GROUP": group,
            "BLOCK_L": min(config["block_l"], group) if packed else config["block_l"], "num_stages": config["stages"],
            "num_warps": config["packed_warps" if packed else "warps"],  # unpacking takes registers
        }  # fmt: skip
        yield "part", _part_kernel, (b * heads, splits), arguments, constants | blocks
        first += splits
    yield (
        "join",
        _join_kernel,
        (b * q.shape[1],),
        (sums, tops, masses, out, d, parts),
        {**blocks, "PARTS": triton.next_power_of_2(parts), "num_warps": 4},
    )


@cache  # `cache` is the word of this module
def _eight(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.int32, device=device)


if triton is not None:

    @triton.jit
    def _codes(  # type: ignore[no-untyped-def]
        words, token, inside, d, eight, DTYPE: tl.constexpr, BITS: tl.constexpr, BLOCK_D: tl.constexpr
    ):  # fmt: skip
        """Codes less 2^(BITS - 1) in DTYPE, [tokens, BLOCK_D]; `token` counts rows of the whole cache."""
        FIELDS: tl.constexpr = 4 if BITS == 8 else 8  # in a word
        ZERO: tl.constexpr = 1 << (BITS - 1)
        at = tl.arange(0, BLOCK_D // FIELDS)[None, :]
        word = tl.load(words + token[:, None] * (d // FIELDS) + at, mask=inside[:, None] & (at < d // FIELDS), other=0).to(tl.int32)
        # the numbers from memory, as in linear_wq: the compiler moves the operand layout up to loads, not past a `tl.arange`
        j = tl.load(eight + tl.arange(0, FIELDS))[None, None, :]
        code = (word[:, :, None] >> BITS * j) & ((1 << BITS) - 1)
        if tl.float16 == DTYPE:
            centred = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
        elif BITS == 8:  # do not fit beside the exponent of bfloat16
            centred = (code - ZERO).to(DTYPE)
        else:
            centred = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (128.0 + ZERO)
        return tl.reshape(centred.to(DTYPE), (token.shape[0], BLOCK_D))

    @triton.jit
    def _part_kernel(  # type: ignore[no-untyped-def]
        q, keys, values, key_scale, key_minimum, value_scale, value_minimum, lengths, eight, sums, tops, masses, scale, heads, room, d,
        parts, first, splits, groups, QUERIES: tl.constexpr, BLOCK_Q: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        dtype: tl.constexpr = q.dtype.element_ty
        head = tl.program_id(0).to(tl.int64)  # of all sequences
        part = tl.program_id(1)
        query = tl.arange(0, BLOCK_Q)
        column = tl.arange(0, BLOCK_D)
        at_q = (head * QUERIES + query)[:, None] * d + column[None, :]
        inside_q = (query < QUERIES)[:, None] & (column < d)[None, :]
        asked = tl.load(q + at_q, mask=inside_q, other=0.0)
        length = tl.minimum(tl.load(lengths + head), room)
        # whole tiles, so that none reaches into two groups
        share = ((length + splits - 1) // splits + BLOCK_L - 1) // BLOCK_L * BLOCK_L
        end = tl.minimum(length, (part + 1) * share)
        total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        mass = tl.zeros((BLOCK_Q,), tl.float32)
        for start in range(part * share, end, BLOCK_L):
            place = start + tl.arange(0, BLOCK_L)
            inside = place < end
            token = head * room + place
            at = token[:, None] * d + column[None, :]
            inside_kv = inside[:, None] & (column < d)[None, :]
            if BITS == 16:
                key = tl.load(keys + at, mask=inside_kv, other=0.0)
                score = tl.dot(asked, tl.trans(key)) * scale
            else:
                at_table = (head * groups + start // GROUP) * d + column
                step = tl.load(key_scale + at_table, mask=column < d, other=0.0).to(tl.float32)
                low = tl.load(key_minimum + at_table, mask=column < d, other=0.0).to(tl.float32) + step * (1 << (BITS - 1))
                wide = asked.to(tl.float32)
                code = _codes(keys, token, inside, d, eight, dtype, BITS, BLOCK_D)
                score = tl.dot((wide * step[None, :]).to(dtype), tl.trans(code))
                score = (score + tl.sum(wide * low[None, :], 1)[:, None]) * scale
            score = tl.where(inside[None, :], score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))  # finite: a tile has at least one token
            weight = tl.exp2(score - higher[:, None])
            fade = tl.exp2(top - higher)
            mass = mass * fade + tl.sum(weight, 1)
            total *= fade[:, None]
            if BITS == 16:
                total = tl.dot(weight.to(dtype), tl.load(values + at, mask=inside_kv, other=0.0), total)
            else:
                step = tl.load(value_scale + token, mask=inside, other=0.0).to(tl.float32)
                low = tl.load(value_minimum + token, mask=inside, other=0.0).to(tl.float32) + step * (1 << (BITS - 1))
                code = _codes(values, token, inside, d, eight, dtype, BITS, BLOCK_D)
                total = tl.dot((weight * step[None, :]).to(dtype), code, total)
                total += tl.sum(weight * low[None, :], 1)[:, None]
            top = higher
        at_part = (head * QUERIES + query) * parts + first + part
        tl.store(tops + at_part, top, mask=query < QUERIES)
        tl.store(masses + at_part, mass, mask=query < QUERIES)
        tl.store(sums + at_part[:, None] * d + column[None, :], total, mask=inside_q)

    @triton.jit
    def _join_kernel(sums, tops, masses, out, d, parts, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
        head = tl.program_id(0).to(tl.int64)
        part = tl.arange(0, PARTS)
        column = tl.arange(0, BLOCK_D)
        top = tl.load(tops + head * parts + part, mask=part < parts, other=-float("inf"))
        highest = tl.max(top, 0)
        # where nothing is kept all are -inf, and -inf - -inf is NaN
        weight = tl.exp2(top - tl.where(highest == -float("inf"), 0.0, highest))
        mass = tl.sum(weight * tl.load(masses + head * parts + part, mask=part < parts, other=0.0), 0)
        at = (head * parts + part)[:, None] * d + column[None, :]
        total = tl.load(sums + at, mask=(part < parts)[:, None] & (column < d)[None, :], other=0.0)
        result = tl.sum(total * weight[:, None], 0) / tl.where(mass == 0.0, 1.0, mass)
        tl.store(out + head * d + column, result.to(out.dtype.element_ty), mask=column < d)
