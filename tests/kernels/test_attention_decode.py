"""Decode attention against float64 on the same stored cache.

Limits (relative Frobenius error; twice that for the worst head): the result and the probabilities are rounded once, for packed keys the
scaled query too, each by at most u = 2^-11 (fp16) or 2^-8 (bf16), about u / sqrt(3) on average. Scores stay below 8 here, so
that the error of the query moves a probability by at most 8 u. On the CPU a packed cache is also rounded when it is decoded. 1e-3 and
6e-3 for 16 bits, twice that for packed caches, whose numbers are larger than what they add up to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.attention_decode import BITS, Cache, PackedCache, attention, flops, launch, moved_bytes, pack, reference

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
CONFIG: dict[str, Any] = {"kernel": "split", "block_l": 16, "splits": 3, "warps": 4, "packed_warps": 4, "stages": 2}
# sequences, query heads, KV heads, room, head size, kept lengths
SHAPES = [
    (1, 1, 1, 1, 16, [[1]]),
    (2, 6, 2, 63, 32, [[63, 0], [1, 17]]),  # a head without tokens, a single token, a ragged tail
    (1, 8, 2, 80, 24, [[80, 33]]),  # a head size that is no power of two
    (1, 3, 3, 40, 16, [[0, 0, 0]]),
]


def _case(b: int, heads: int, kv: int, room: int, d: int, lengths: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Cache, Tensor]:
    generator = torch.Generator().manual_seed(room)
    q, keys, values = (torch.randn(s, generator=generator) for s in ((b, heads, d), (b, kv, room, d), (b, kv, room, d)))
    keys[..., ::5] *= 4  # channels of different size, as keys have
    return q.to(dtype), Cache(keys.to(dtype), values.to(dtype)), torch.tensor(lengths, dtype=torch.int32)


def _poisoned(cache: Cache, lengths: Tensor) -> Cache:
    """NaN wherever nothing is kept."""
    past = torch.arange(cache.shape[2]) >= lengths[..., None]
    return Cache(*(tensor.masked_fill(past[..., None], torch.nan) for tensor in (cache.keys, cache.values)))


def _on(device: torch.device, cache: Cache | PackedCache) -> Any:
    return type(cache)(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(cache).items()})


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    found, exact = found.cpu().double().flatten(0, 1), exact.flatten(0, 1)
    assert found.isfinite().all()
    empty = exact.norm(dim=1) == 0
    assert torch.equal(found[empty], exact[empty])
    if not empty.all():
        assert float((found - exact).norm() / exact.norm()) <= limit
        assert (
            float(((found - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit
        )


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", [16, *BITS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path_gives_the_exact_result(shape: Any, bits: int, dtype: torch.dtype) -> None:
    q, cache, lengths = _case(*shape, dtype)
    stored = _poisoned(cache, lengths) if bits == 16 else pack(cache, bits, 16)
    _assert_near(attention(q, stored, lengths), reference(q, stored, lengths, q.shape[2] ** -0.5), LIMIT[dtype] * (1 if bits == 16 else 2))


@pytest.mark.parametrize("bits", [16, *BITS])
def test_recent_tokens_and_older_ones_are_one(bits: int) -> None:
    q, cache, lengths = _case(*SHAPES[1], torch.float16)
    _, recent, _ = _case(*SHAPES[1][:3], 5, *SHAPES[1][4:], torch.float16)
    kept = torch.tensor([[5, 2], [0, 4]], dtype=torch.int32)
    stored = cache if bits == 16 else pack(cache, bits, 32)
    exact = reference(q, stored, lengths, 0.3, recent, kept)
    _assert_near(attention(q, stored, lengths, 0.3, _poisoned(recent, kept), kept), exact, LIMIT[torch.float16] * (1 if bits == 16 else 2))
    if bits == 16:
        joined = Cache(
            *(
                torch.cat([old[1:, 1:, :17], new[1:, 1:, :4]], 2)
                for old, new in zip(*(vars(c).values() for c in (cache, recent)), strict=True)
            )
        )
        alone = reference(q[1:, 3:], joined, torch.tensor([[21]], dtype=torch.int32), 0.3)
        torch.testing.assert_close(exact[1:, 3:], alone)


def test_reference_is_the_formula() -> None:
    q, keys, values = (
        torch.tensor([[[1.0, 0.0]]]).half(),
        torch.tensor([[[[2.0, 9.0], [0.0, 9.0]]]]).half(),
        torch.tensor([[[[1.0, 5.0], [0.0, 5.0]]]]).half(),
    )
    found = reference(q, Cache(keys, values), torch.tensor([[2]], dtype=torch.int32), 0.5)
    torch.testing.assert_close(found, torch.tensor([[[1 / (1 + torch.e**-1), 5.0]]], dtype=torch.float64))


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_off_by_half_a_step_and_costs_what_it_says(bits: int) -> None:
    _, cache, _ = _case(2, 4, 2, 50, 32, [[50, 50]] * 2, torch.float16)
    packed = pack(cache, bits, 16)
    keys, values = packed.dense(torch.float64)
    for found, exact, scale in (
        (keys, cache.keys, packed.key_scale.repeat_interleave(16, 2)[:, :, :50]),
        (values, cache.values, packed.value_scale[..., None]),
    ):
        # the scale is rounded to 2^-11 of itself, so the last of 2^bits - 1 steps may fall that short
        assert bool(((found - exact.double()).abs() <= scale.double() * (0.5 + 2.0 ** (bits - 11))).all())
    stored = [value for value in vars(packed).values() if isinstance(value, Tensor)]
    whole = pack(Cache(cache.keys[:, :, :48].contiguous(), cache.values[:, :, :48].contiguous()), bits, 16)
    assert moved_bytes(48 * 4, 0, 0, 32, bits, 16) == sum(value.nbytes for value in vars(whole).values() if isinstance(value, Tensor))
    assert len(stored) == 6


def test_bytes_and_operations() -> None:
    q, cache, lengths = _case(*SHAPES[1][:5], [[63, 63], [63, 63]], torch.float16)
    moved = sum(tensor.nbytes for tensor in (q, cache.keys, cache.values, attention(q, cache, lengths)))
    assert moved_bytes(int(lengths.sum()), 2, 6, 32) == moved
    assert flops(10, 3, 32) == 10 * 3 * 2 * 2 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(1, 3, 16).half()}, r"q must be float16 or bfloat16 \[1, multiple of 2, 16\]: got torch.float16 \(1, 3, 16\)"),
        ({"q": torch.ones(1, 4, 16).bfloat16()}, "cache must be torch.bfloat16 on cpu as q is: got torch.float16"),
        ({"lengths": torch.ones(1, 2)}, r"lengths must be a contiguous torch.int32 \(1, 2\) on cpu: got torch.float32"),
        ({"recent_lengths": torch.ones(1, 2, dtype=torch.int32)}, "given together or not at all"),
    ],
)
def test_operands_that_do_not_belong_together_are_refused(changes: dict[str, Tensor], message: str) -> None:
    q, cache, lengths = _case(1, 4, 2, 8, 16, [[8, 8]], torch.float16)
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "cache": cache, "lengths": lengths, **changes})


def test_caches_of_other_forms_are_refused() -> None:
    _, cache, _ = _case(1, 4, 2, 8, 16, [[8, 8]], torch.float16)
    with pytest.raises(ValueError, match=r"values must be a contiguous torch.float16 \(1, 2, 8, 16\)"):
        Cache(cache.keys, cache.values[:, :, :4])
    with pytest.raises(ValueError, match="need 8, 4 or 2 bits"):
        pack(cache, 3)
    packed = pack(cache, 4, 16)
    with pytest.raises(ValueError, match="group must be a power of two, at least 16: got 24"):
        PackedCache(**{**vars(packed), "group": 24})


@pytest.mark.interpreted
@pytest.mark.parametrize("bits", [16, *BITS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_interpreted_kernel_gives_the_exact_result(shape: Any, bits: int, splits: int) -> None:
    q, cache, lengths = _case(*shape, torch.float16)
    stored = _poisoned(cache, lengths) if bits == 16 else pack(cache, bits, 32)
    out = torch.full_like(q, torch.nan)
    launch(q, stored, lengths, q.shape[2] ** -0.5, None, None, out, {**CONFIG, "splits": splits})
    _assert_near(out, reference(q, stored, lengths, q.shape[2] ** -0.5), LIMIT[torch.float16] * (1 if bits == 16 else 2))


@pytest.mark.interpreted
@pytest.mark.parametrize("bits", [16, 4])
def test_interpreted_kernel_joins_recent_tokens(bits: int) -> None:
    q, cache, lengths = _case(*SHAPES[1], torch.float16)
    _, recent, _ = _case(*SHAPES[1][:3], 5, *SHAPES[1][4:], torch.float16)
    kept = torch.tensor([[5, 0], [0, 4]], dtype=torch.int32)
    stored, out = cache if bits == 16 else pack(cache, bits, 32), torch.full_like(q, torch.nan)
    launch(q, stored, lengths, 0.3, recent, kept, out, CONFIG)
    _assert_near(out, reference(q, stored, lengths, 0.3, recent, kept), LIMIT[torch.float16] * (1 if bits == 16 else 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", [16, *BITS])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 8, 700, 128, [[700, 0, 1, 64, 65, 333, 512, 699]] * 2)], ids=str)
def test_kernel_gives_the_exact_result(cuda: torch.device, shape: Any, bits: int, dtype: torch.dtype) -> None:
    q, cache, lengths = _case(*shape, dtype)
    stored = _poisoned(cache, lengths) if bits == 16 else pack(cache, bits, 64)
    exact = reference(q, stored, lengths, q.shape[2] ** -0.5)
    moved, out = _on(cuda, stored), torch.full_like(q, torch.nan, device=cuda)
    _assert_near(attention(q.to(cuda), moved, lengths.to(cuda)), exact, LIMIT[dtype] * (1 if bits == 16 else 2))
    b, heads, room, d = cache.shape
    config = tuned.nearest("attention_decode", b * heads, room, d, cuda)
    launch(q.to(cuda), moved, lengths.to(cuda), q.shape[2] ** -0.5, None, None, out, config)
    _assert_near(out, exact, LIMIT[dtype] * (1 if bits == 16 else 2))
