"""Scores against float64, the choice against sorting, the gathered cache against indexing.

Limit (relative Frobenius error, twice that for the worst head): 16-bit inputs enter exactly and everything else is float32: 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.attention_decode import Cache, attention
from autoeff.kernels.attention_decode import reference as attention_reference
from autoeff.kernels.kv_evict import (
    MAX_QUERIES,
    choose,
    flops,
    gather,
    gather_bytes,
    gather_launch,
    launch,
    moved_bytes,
    reference,
    score,
)

CONFIG: dict[str, Any] = {"kernel": "two passes", "block_l": 16, "splits": 2, "warps": 4, "stages": 2}
# sequences, query heads, KV heads, tokens, window, head size
SHAPES = [(1, 1, 1, 1, 1, 16), (2, 6, 2, 63, 5, 24), (1, 4, 4, 40, 16, 32), (1, 3, 1, 8, 8, 16)]


def _case(b: int, heads: int, kv: int, tokens: int, window: int, d: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Cache]:
    generator = torch.Generator().manual_seed(tokens)
    q, keys, values = (torch.randn(s, generator=generator) for s in ((b, heads, window, d), (b, kv, tokens, d), (b, kv, tokens, d)))
    return (2 * q).to(dtype), Cache(keys.to(dtype), values.to(dtype))


def _assert_near(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    away, exact = (found.cpu().double() - exact).flatten(0, 1), exact.flatten(0, 1)
    assert away.isfinite().all()
    if exact.numel():
        assert float(away.norm() / exact.norm()) <= 1e-5
        assert float((away.norm(dim=1) / exact.norm(dim=1)).max()) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", [1, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path_gives_the_exact_scores(shape: Any, pool: int, dtype: torch.dtype) -> None:
    q, cache = _case(*shape, dtype)
    _assert_near(score(q, cache.keys, pool=pool), reference(q, cache.keys, q.shape[3] ** -0.5, pool))


def test_reference_is_the_formula() -> None:
    q = torch.zeros(1, 2, 2, 4)
    keys = torch.randn(1, 1, 5, 4)
    # equal logits: the first query sees four tokens, the second all five; added over two queries, averaged over two heads
    torch.testing.assert_close(reference(q, keys, 1.0, 1), torch.full((1, 1, 3), 1 / 4 + 1 / 5, dtype=torch.float64))


def test_each_head_keeps_its_best_tokens_and_the_window_in_their_order() -> None:
    scores = torch.tensor([[[5.0, 1.0, 4.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]]])
    places, lengths = choose(scores, torch.tensor([[2, 0, 9]], dtype=torch.int32), 2)
    assert lengths.tolist() == [[4, 2, 7]]
    assert [places[0, head, : lengths[0, head]].tolist() for head in range(3)] == [[0, 2, 5, 6], [5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert places.shape == (1, 3, 7)
    assert int(places.max()) <= 6


def test_attention_to_the_kept_tokens_is_that_to_a_masked_cache() -> None:
    q, cache = _case(*SHAPES[1])
    places, lengths = choose(score(q, cache.keys), torch.tensor([[9, 0], [3, 58]], dtype=torch.int32), 5)
    kept = gather(cache, places, lengths)
    asked = q[:, :, -1].contiguous()
    exact = torch.zeros_like(asked, dtype=torch.float64)
    for b in range(2):
        for head in range(6):
            at = places[b, head // 3, : lengths[b, head // 3]].long()
            keys, values = (t[b, head // 3, at].double() for t in (cache.keys, cache.values))
            exact[b, head] = (keys @ asked[b, head].double() * 24**-0.5).softmax(0) @ values
    torch.testing.assert_close(attention_reference(asked, kept, lengths, 24**-0.5), exact)
    torch.testing.assert_close(attention(asked, kept, lengths).double(), exact, rtol=5e-3, atol=2e-3)
    assert not kept.keys[0, 1, 5:].any()


def test_bytes_and_operations() -> None:
    q, cache = _case(*SHAPES[1])
    found = score(q, cache.keys)
    assert moved_bytes(2, 6, 2, 63, 5, 24) == q.nbytes + cache.keys.nbytes + found.nbytes
    assert flops(2, 6, 63, 5, 24) == 2 * 2 * 6 * 5 * 63 * 24
    places, lengths = choose(found, torch.full((2, 2), 7, dtype=torch.int32), 5)
    kept = gather(cache, places, lengths)
    assert gather_bytes(int(lengths.sum()), 12, 4, 24) == 2 * (kept.keys.nbytes + kept.values.nbytes) + places.nbytes


def test_operands_that_do_not_belong_together_are_refused() -> None:
    q, cache = _case(*SHAPES[1])
    with pytest.raises(ValueError, match="must be float16 or bfloat16, alike"):
        score(q.bfloat16(), cache.keys)
    with pytest.raises(ValueError, match="do not belong together"):
        score(q[:, :5], cache.keys)
    with pytest.raises(ValueError, match="pool must be odd, at least 1: got 2"):
        score(q, cache.keys, pool=2)
    with pytest.raises(ValueError, match=r"budget must be torch.int32 \(2, 2\)"):
        choose(score(q, cache.keys), torch.ones(2, 2), 5)
    with pytest.raises(ValueError, match=r"lengths must be torch.int32 \(2, 2\)"):
        gather(cache, torch.zeros(2, 2, 3, dtype=torch.int32), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="scores must be contiguous"):
        launch(q, cache.keys, 1.0, torch.empty(2, 2, 63), CONFIG)
    q, cache = _case(1, 1, 1, MAX_QUERIES + 2, MAX_QUERIES + 1, 16)
    with pytest.raises(ValueError, match="up to 256 queries for a KV head: got 257"):
        launch(q, cache.keys, 1.0, torch.empty(1, 1, 1), CONFIG)


@pytest.mark.interpreted
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_give_the_exact_scores(shape: Any, splits: int) -> None:
    q, cache = _case(*shape)
    b, _, kv, tokens, window, d = shape
    found = torch.full((b, kv, tokens - window), torch.nan)
    launch(q, cache.keys, d**-0.5, found, {**CONFIG, "splits": splits})
    _assert_near(found, reference(q, cache.keys, d**-0.5, 1))


@pytest.mark.interpreted
def test_interpreted_kernel_gathers_the_kept_tokens() -> None:
    _, cache = _case(2, 2, 2, 90, 5, 24)
    places = torch.arange(80).flip(0).expand(2, 2, 80).int().contiguous()
    lengths = torch.tensor([[80, 0], [1, 66]], dtype=torch.int32)
    keys, values = torch.full((2, 2, 80, 24), torch.nan).half(), torch.full((2, 2, 80, 24), torch.nan).half()
    gather_launch(cache, places, lengths, keys, values)
    expected = gather(cache, places, lengths)
    assert torch.equal(keys, expected.keys)
    assert torch.equal(values, expected.values)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 8, 700, 32, 128)], ids=str)
def test_kernels_give_the_exact_scores_and_tokens(cuda: torch.device, shape: Any, dtype: torch.dtype) -> None:
    q, cache = _case(*shape, dtype)
    b, _, kv, tokens, window, d = shape
    moved = Cache(cache.keys.to(cuda), cache.values.to(cuda))
    _assert_near(score(q.to(cuda), moved.keys), reference(q, cache.keys, d**-0.5, 7))
    found = torch.full((b, kv, tokens - window), torch.nan, device=cuda)
    launch(q.to(cuda), moved.keys, d**-0.5, found, tuned.nearest("kv_evict", b * kv, tokens, d, cuda))
    _assert_near(found, reference(q, cache.keys, d**-0.5, 1))
    places, lengths = choose(found, torch.full((b, kv), tokens // 3, dtype=torch.int32), window)
    kept, expected = gather(moved, places, lengths), gather(cache, places.cpu(), lengths.cpu())
    assert torch.equal(kept.keys.cpu(), expected.keys)
    assert torch.equal(kept.values.cpu(), expected.values)
