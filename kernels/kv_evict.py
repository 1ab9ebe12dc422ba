"""Which cached tokens a head keeps after prefill, and a cache of those alone: score, choose, gather.

    score    a token's attention from the last `window` queries, after the softmax over all tokens, added over the queries and averaged
             over the query heads of a KV head; then the maximum over `pool` neighbours, so that a kept token keeps its context
    choose   of each (sequence, KV head) the `budget` best tokens before the window, and the window; in their order
    gather   keys and values of the chosen tokens, as `attention_decode` reads them; what lies past a head's length is 0

On CUDA: one pass over the keys leaves maximum and mass of each query, part by part; a second one weighs the keys; then a copy. Products of
16-bit numbers, everything else float32: nothing is rounded. Choosing is torch's `topk`. On the CPU all of it is torch.

Source: SnapKV (Li et al. 2024, arXiv:2404.14469); per-head budgets, Ada-KV (Feng et al. 2024, arXiv:2407.11550).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from autoeff.kernels import tuned
from autoeff.kernels.attention_decode import Cache

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["choose", "flops", "gather", "gather_bytes", "gather_launch", "hopper_cases", "launch", "moved_bytes", "reference", "score"]

_LOG2_E = 1 / 0.6931471805599453
_BLOCK_COPY = 64
MAX_QUERIES = 256
"""Window times query heads of a KV head, of the Triton kernels: their scores of a tile stay in registers."""


def moved_bytes(b: int, heads: int, kv_heads: int, tokens: int, window: int, d: int) -> int:
    """Bytes that scoring reads and writes at the least: keys once, queries, float32 scores."""
    return 2 * d * b * (kv_heads * tokens + heads * window) + 4 * b * kv_heads * (tokens - window)


def gather_bytes(kept: int, room: int, heads: int, d: int) -> int:
    """Bytes that gathering reads and writes at the least, for so many kept tokens over all heads and `heads` caches of this room."""
    return 2 * 2 * d * (kept + room * heads) + 4 * room * heads


def flops(b: int, heads: int, tokens: int, window: int, d: int) -> int:
    """Floating-point operations of the products, once."""
    return 2 * b * heads * window * tokens * d


def reference(q: Tensor, keys: Tensor, scale: float, pool: int) -> Tensor:
    """The exact scores, float64 [B, KV heads, T - window]."""
    b, heads, window, d = q.shape
    kv, tokens = keys.shape[1], keys.shape[2]
    asked = q.cpu().double().view(b, kv, heads // kv, window, d)
    logits = torch.einsum("bhgwd,bhtd->bhgwt", asked, keys.cpu().double()) * scale
    later = torch.arange(tokens) > tokens - window + torch.arange(window)[:, None]
    found = logits.masked_fill(later, -torch.inf).softmax(-1).sum(3).mean(2)[:, :, : tokens - window]
    places = [found[:, :, max(0, t - pool // 2) : t + pool // 2 + 1].amax(2) for t in range(found.shape[2])]
    return torch.stack(places, 2) if places else found


def score(q: Tensor, keys: Tensor, scale: float | None = None, pool: int = 7) -> Tensor:
    """The score of each token before the window, float32 [B, KV heads, T - window]; larger is more important.

    Args:
        q: Queries of the last `window` tokens, float16 or bfloat16 [B, heads, window, D], after the position encoding.
        keys: Of all T tokens, those of the window last, [B, KV heads, T, D] in the dtype of q, contiguous.
        scale: Of the products; D^-0.5 if not given.
        pool: Neighbours whose maximum counts, odd; 1 for none.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others; an even pool.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(q, keys)
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"pool must be odd, at least 1: got {pool}")
    (b, heads, window, d), (_, kv, tokens, _) = q.shape, keys.shape
    scale = d**-0.5 if scale is None else scale
    if q.is_cuda and window * heads // kv <= MAX_QUERIES:
        found = torch.empty(b, kv, tokens - window, dtype=torch.float32, device=q.device)
        launch(q.contiguous(), keys, scale, found, tuned.nearest("kv_evict", b * kv, tokens, d, q.device))
    else:
        asked = q.float().reshape(b, kv, heads // kv * window, d)
        logits = (asked @ keys.float().transpose(2, 3)).view(b, kv, heads // kv, window, tokens) * scale
        later = torch.arange(tokens, device=q.device) > tokens - window + torch.arange(window, device=q.device)[:, None]
        found = logits.masked_fill_(later, -torch.inf).softmax(-1).sum(3).mean(2)[:, :, : tokens - window]
    return max_pool1d(found, pool, 1, pool // 2) if pool > 1 and found.shape[2] else found


def choose(scores: Tensor, budget: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Kept places, int32 [B, KV heads, room] in their order, and how many they are, int32 [B, KV heads]; the window is always kept.

    Args:
        scores: float32 [B, KV heads, T - window].
        budget: int32 [B, KV heads], on the CPU: tokens to keep before the window; more than there are means all.
        window: Tokens.

    Raises:
        ValueError: A budget of another shape, or below 0.
    """
    if budget.shape != scores.shape[:2] or budget.dtype != torch.int32 or budget.device.type != "cpu" or bool((budget < 0).any()):
        raise ValueError(
            f"budget must be torch.int32 {tuple(scores.shape[:2])} on the CPU, none below 0: got {budget.dtype} {tuple(budget.shape)}"
        )
    before = scores.shape[2]
    most = min(before, int(budget.max())) if budget.numel() else 0
    kept = budget.clamp(max=before).to(scores.device)
    best = scores.topk(most, dim=2).indices
    # what a head may not keep sorts behind the window
    rank = torch.arange(most, device=scores.device)
    last = torch.arange(before, before + window, device=scores.device).expand(*scores.shape[:2], window)
    places = torch.cat([torch.where(rank < kept[..., None], best, before + window), last], 2).sort(2).values
    return places.clamp(max=max(before + window - 1, 0)).int(), kept + window


def gather(cache: Cache, places: Tensor, lengths: Tensor) -> Cache:
    """A cache with room for `places.shape[2]` tokens that holds the chosen ones of each head first, then zeros.

    Args:
        cache: [B, KV heads, T, D].
        places: int32 [B, KV heads, room], below T.
        lengths: int32 [B, KV heads], how many of them count.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
    """
    b, kv, _, d = cache.shape
    keys, values = (torch.empty(b, kv, places.shape[-1], d, dtype=cache.keys.dtype, device=cache.keys.device) for _ in range(2))
    if cache.keys.is_cuda:
        gather_launch(cache, places.contiguous(), lengths.contiguous(), keys, values)
    else:
        _check_places(cache, places, lengths)
        counts = (torch.arange(places.shape[2]) < lengths[..., None])[..., None]
        at = places.long()[..., None].expand(*places.shape, d)
        for found, given in ((keys, cache.keys), (values, cache.values)):
            found.copy_(torch.where(counts, given.gather(2, at), 0.0))
    return Cache(keys, values)


def launch(q: Tensor, keys: Tensor, scale: float, scores: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernels from contiguous q into scores [B, KV heads, T - window], before the pooling.

    Raises:
        ValueError: As in `score`; more than `MAX_QUERIES` rows.
        RuntimeError: Triton is not installed.
    """
    _check(q, keys)
    (b, heads, window, _), (_, kv, tokens, _) = q.shape, keys.shape
    expected = (b, kv, tokens - window)
    if scores.dtype != torch.float32 or tuple(scores.shape) != expected or not (scores.is_contiguous() and q.is_contiguous()):
        raise ValueError(f"scores must be contiguous torch.float32 {expected}: got {scores.dtype} {tuple(scores.shape)}")
    if window * heads // kv > MAX_QUERIES:
        raise ValueError(f"the kernels take up to {MAX_QUERIES} queries for a KV head: got {window * heads // kv}")
    if triton is None:
        raise RuntimeError("scoring on a GPU needs Triton, which is not installed: pip install 'triton>=3.6'")
    if not scores.numel():
        return
    with torch.cuda.device(q.get_device()):  # on the CPU (-1) it does nothing
        for _, kernel, grid, arguments, options in _launches(q, keys, scale, scores, config):
            kernel[grid](*arguments, **options)


def gather_launch(cache: Cache, places: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> None:
    """Runs the Triton kernel into contiguous keys and values [B, KV heads, room, D].

    Raises:
        ValueError: As in `gather`.
        RuntimeError: Triton is not installed.
    """
    _check_places(cache, places, lengths)
    if triton is None:
        raise RuntimeError("gathering on a GPU needs Triton, which is not installed: pip install 'triton>=3.6'")
    if keys.numel():
        kernel, grid, arguments, options = _gather_arguments(cache, places, lengths, keys, values)
        with torch.cuda.device(keys.get_device()):
            kernel[grid](*arguments, **options)


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in (torch.float16, torch.bfloat16):
        for config in tuned.configurations("kv_evict"):
            kv, tokens, d = config["m"], config["n"], config["k"]
            q, keys, scores = (
                meta(1, 4 * kv, 32, d, dtype=dtype),
                meta(1, kv, tokens, d, dtype=dtype),
                meta(1, kv, tokens - 32, dtype=torch.float32),
            )
            for name, *case in _launches(q, keys, 1.0, scores, config):
                yield f"kv_evict {name}", f"{dtype}; {tuned.label(config)}", *case, config["block_l"] >= 64
        cache, room = Cache(meta(1, 8, 4096, 128, dtype=dtype), meta(1, 8, 4096, 128, dtype=dtype)), meta(1, 8, 1024, 128, dtype=dtype)
        places, lengths = meta(1, 8, 1024, dtype=torch.int32), meta(1, 8, dtype=torch.int32)
        yield "kv_evict gather", f"{dtype}; one configuration", *_gather_arguments(cache, places, lengths, room, room), False


def _check(q: Tensor, keys: Tensor) -> None:
    alike = q.dim() == keys.dim() == 4 and keys.dtype == q.dtype and keys.device == q.device
    if q.dtype not in (torch.float16, torch.bfloat16) or not alike:
        found = f"{q.dtype} {tuple(q.shape)}, {keys.dtype} {tuple(keys.shape)}"
        raise ValueError(f"q and keys must be float16 or bfloat16, alike, of rank 4: got {found}")
    together = q.shape[0] == keys.shape[0] and q.shape[3] == keys.shape[3] and q.shape[1] % keys.shape[1] == 0
    if not together or not 1 <= q.shape[2] <= keys.shape[2] or not keys.is_contiguous():
        found = f"{tuple(q.shape)}, {tuple(keys.shape)}"
        raise ValueError(f"q [B, heads, window, D] and contiguous keys [B, KV heads, T, D] do not belong together: got {found}")


def _check_places(cache: Cache, places: Tensor, lengths: Tensor) -> None:
    shape = cache.shape[:2]
    if places.dim() != 3 or places.shape[:2] != shape or places.dtype != torch.int32 or places.device != cache.keys.device:
        raise ValueError(
            f"places must be torch.int32 [{shape[0]}, {shape[1]}, room] on {cache.keys.device}: got {places.dtype} {tuple(places.shape)}"
        )
    if lengths.shape != shape or lengths.dtype != torch.int32 or lengths.device != cache.keys.device:
        raise ValueError(f"lengths must be torch.int32 {shape} on {cache.keys.device}: got {lengths.dtype} {tuple(lengths.shape)}")


def _launches(
    q: Tensor, keys: Tensor, scale: float, scores: Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Name, kernel, grid, positional arguments and constants of each launch, in their order."""
    (b, heads, window, d), (_, kv, tokens, _) = q.shape, keys.shape
    splits, queries = config["splits"], heads // kv * window
    tops, masses = (torch.empty(b * kv, splits, queries, dtype=torch.float32, device=q.device) for _ in range(2))
    constants = {
        "QUERIES": queries, "WINDOW": window, "SPLITS": splits, "BLOCK_Q": max(16, triton.next_power_of_2(queries)),
        "BLOCK_L": config["block_l"], "BLOCK_D": max(16, triton.next_power_of_2(d)), "num_warps": config["warps"],
        "num_stages": config["stages"],
    }  # fmt: skip
    arguments = (q, keys, tops, masses, scores, scale * _LOG2_E, tokens, d)
    yield "mass", _mass_kernel, (b * kv, splits), arguments, constants
    yield "score", _score_kernel, (b * kv, triton.cdiv(tokens - window, config["block_l"])), arguments, constants


def _gather_arguments(
    cache: Cache, places: Tensor, lengths: Tensor, keys: Tensor, values: Tensor
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    b, kv, tokens, d = cache.shape
    room = places.shape[2]
    constants = {"BLOCK_L": _BLOCK_COPY, "BLOCK_D": triton.next_power_of_2(d), "num_warps": 4}
    arguments = (cache.keys, cache.values, places, lengths, keys, values, tokens, room, d)
    return _gather_kernel, (b * kv, triton.cdiv(room, _BLOCK_COPY)), arguments, constants


if triton is not None:

    @triton.jit
    def _logits(  # type: ignore[no-untyped-def]
        asked, keys, head, place, scale, tokens, d, QUERIES: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """[tokens, queries], in powers of two; -inf where a query does not see a token."""
        column, query = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q)
        inside = (place < tokens)[:, None] & (column < d)[None, :]
        key = tl.load(keys + (head * tokens + place)[:, None] * d + column[None, :], mask=inside, other=0.0)
        seen = (place[:, None] <= tokens - WINDOW + (query % WINDOW)[None, :]) & (query < QUERIES)[None, :]
        return tl.where(seen, tl.dot(key, asked) * scale, -float("inf"))

    @triton.jit
    def _asked(q, head, d, QUERIES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
        """The queries of a KV head as columns."""
        column, query = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Q)
        inside = (query < QUERIES)[None, :] & (column < d)[:, None]
        return tl.load(q + (head * QUERIES + query)[None, :] * d + column[:, None], mask=inside, other=0.0)

    @triton.jit
    def _mass_kernel(  # type: ignore[no-untyped-def]
        q, keys, tops, masses, scores, scale, tokens, d, QUERIES: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(0).to(tl.int64)
        asked = _asked(q, head, d, QUERIES, BLOCK_Q, BLOCK_D)
        top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        mass = tl.zeros((BLOCK_Q,), tl.float32)
        share = ((tokens + SPLITS - 1) // SPLITS + BLOCK_L - 1) // BLOCK_L * BLOCK_L
        first = tl.program_id(1) * share
        for start in range(first, tl.minimum(first + share, tokens), BLOCK_L):
            logits = _logits(asked, keys, head, start + tl.arange(0, BLOCK_L), scale, tokens, d, QUERIES, WINDOW, BLOCK_Q, BLOCK_D)
            higher = tl.maximum(top, tl.max(logits, 0))
            # a query may see nothing of this part, and -inf - -inf is NaN
            base = tl.where(higher == -float("inf"), 0.0, higher)
            mass = mass * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[None, :]), 0)
            top = higher
        query = tl.arange(0, BLOCK_Q)
        at = (head * SPLITS + tl.program_id(1)) * QUERIES + query
        tl.store(tops + at, top, mask=query < QUERIES)
        tl.store(masses + at, mass, mask=query < QUERIES)

    @triton.jit
    def _score_kernel(  # type: ignore[no-untyped-def]
        q, keys, tops, masses, scores, scale, tokens, d, QUERIES: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(0).to(tl.int64)
        query = tl.arange(0, BLOCK_Q)
        top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        for part in range(SPLITS):
            at = (head * SPLITS + part) * QUERIES + query
            top = tl.maximum(top, tl.load(tops + at, mask=query < QUERIES, other=-float("inf")))
        top = tl.where(query < QUERIES, top, 0.0)  # finite: every query sees the first token
        mass = tl.zeros((BLOCK_Q,), tl.float32)
        for part in range(SPLITS):
            at = (head * SPLITS + part) * QUERIES + query
            fade = tl.exp2(tl.load(tops + at, mask=query < QUERIES, other=-float("inf")) - top)
            mass += fade * tl.load(masses + at, mask=query < QUERIES, other=0.0)
        place = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
        asked = _asked(q, head, d, QUERIES, BLOCK_Q, BLOCK_D)
        logits = _logits(asked, keys, head, place, scale, tokens, d, QUERIES, WINDOW, BLOCK_Q, BLOCK_D)
        weight = tl.exp2(logits - top[None, :]) / tl.where(query < QUERIES, mass, 1.0)[None, :]
        result = tl.sum(weight, 1) * (WINDOW / QUERIES)
        before = tokens - WINDOW
        tl.store(scores + head * before + place, result, mask=place < before)

    @triton.jit
    def _gather_kernel(  # type: ignore[no-untyped-def]
        keys, values, places, lengths, out_keys, out_values, tokens, room, d, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr
    ):  # fmt: skip
        head = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
        column = tl.arange(0, BLOCK_D)
        kept = at < tl.minimum(tl.load(lengths + head), room)
        place = tl.load(places + head * room + at, mask=kept, other=0)
        source = (head * tokens + place)[:, None] * d + column[None, :]
        target = (head * room + at)[:, None] * d + column[None, :]
        read, write = kept[:, None] & (column < d)[None, :], (at < room)[:, None] & (column < d)[None, :]
        tl.store(out_keys + target, tl.load(keys + source, mask=read, other=0.0), mask=write)
        tl.store(out_values + target, tl.load(values + source, mask=read, other=0.0), mask=write)
