"""A thinned cache against the full one, against token-by-token decoding, and against each policy written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.kernels import attention_decode, kv_evict
from autoeff.spaces.kv_cache import (
    POLICIES,
    KvCache,
    KvPlan,
    KvState,
    continuation_start,
    packed_bytes,
    plan_part,
    plans_of,
    rounded,
    watched,
)
from autoeff.spaces.sites import find_structure

FAMILIES = ("llama", "gpt2", "gemma2", "opt", "gpt_neox", "mixtral")
CONTEXT = 64


def attentions(model: nn.Module) -> list[str]:
    return [site.name for site in find_structure(model).sites if site.kind == "attention" and site.kv is not None]


@contextmanager
def under(model: nn.Module, **plan: Any) -> Iterator[None]:
    """The same plan for every attention."""
    with ExitStack() as stack:
        for name in attentions(model):
            stack.callback(plan_part(model, name, "test", plan))
        yield


def text(length: int = CONTEXT, sequences: int = 2) -> Tensor:
    return torch.randint(2, 61, (sequences, length), generator=torch.Generator().manual_seed(1))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_budget_gives_the_logits_and_the_tokens_of_the_full_cache(tiny_model: Callable[..., Any], family: str) -> None:
    model, ids = tiny_model(family), text()
    expected = model(ids).logits
    said = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    tokens = model.generate(ids[:, :40], **said)
    with under(model, share=1.0):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        cache = KvCache(model, CONTEXT)
        assert torch.equal(model.generate(ids[:, :40], past_key_values=cache, **said), tokens)
        assert cache.states
        assert all(state.tokens == 51 for state in cache.states)  # the last token was not fed
    assert torch.equal(model(ids).logits, expected)
    assert plans_of(model) == []


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_at_once_is_a_prompt_followed_by_single_tokens(tiny_model: Callable[..., Any], family: str, policy: str) -> None:
    length = 64 if family in ("gpt2", "gemma2") else 128
    model, ids = tiny_model(family).double(), text(length)  # in float32 noise now and then moves a code
    dense = model(ids).logits
    with under(model, share=0.25, policy=policy, key_bits=4, value_bits=8, recent=2):
        at_once = model(ids).logits
        cache, start = KvCache(model, length), continuation_start(length)
        logits = [model(ids[:, :start], past_key_values=cache).logits]
        logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, length)]
        assert cache.get_seq_length() == length
    torch.testing.assert_close(torch.cat(logits, 1), at_once, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(at_once, dense, atol=1e-2)


@pytest.mark.parametrize("bits", [(16, 16), (8, 2), (2, 16)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_a_cache_holds_its_budget_and_no_more(share: float, bits: tuple[int, int]) -> None:
    """What it takes while text is generated, and at the most what the cost model says."""
    tokens, heads, size = 1024, 2, 8
    plan = KvPlan(share, key_bits=bits[0], value_bits=bits[1])
    sizes, state = plan.sizes(tokens), KvState(plan, tokens)
    prompt = 512
    query, key, value = numbers(1, 4, tokens, size), numbers(1, heads, tokens, size, seed=1), numbers(1, heads, tokens, size, seed=2)
    state.prefill(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], 1.0)
    found = []
    for i in range(prompt, tokens):
        state.decode(query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1], 1.0)
        found.append((state.tokens, state.stored_bytes))
    budget = tokens if sizes.budget is None else sizes.budget
    packed = sizes.packed(budget - sizes.interval)
    bound = 0
    for width, by_channel in zip(bits, (True, False), strict=True):
        stored = packed_bytes(heads, size, packed, width, sizes.group, by_channel=by_channel) if width < 16 else 2 * heads * size * packed
        bound += stored + 2 * heads * size * (budget - packed)
    assert max(n for n, _ in found) <= budget
    assert max(b for _, b in found) <= bound
    if share < 1:
        # just before a round it is as full as it may be
        assert max(n for n, _ in found) == budget - 1
        assert bound - max(b for _, b in found) == 2 * 2 * heads * size


def test_groups_are_formed_anew_after_an_eviction() -> None:
    """So keys of a group and channel have as many values as there are codes, and as many tokens are packed as may be."""
    tokens = 512
    state = KvState(KvPlan(0.5, "h2o", key_bits=2), tokens)
    state.prefill(numbers(1, 4, tokens, 8), numbers(1, 2, tokens, 8, seed=1), numbers(1, 2, tokens, 8, seed=2), 1.0)
    assert state.keys is not None
    assert state.packed == state.sizes.packed(state.tokens) > 0
    for group in state.keys[0, :, : state.packed].split(state.sizes.group, 1):
        assert all(len(channel.unique()) <= 4 for channel in group.transpose(1, 2).reshape(-1, state.sizes.group))


def test_the_sinks_and_the_window_are_never_evicted_and_streaming_keeps_nothing_else() -> None:
    tokens = 256
    plan = KvPlan(0.125, "streaming")
    sizes, state = plan.sizes(tokens), KvState(plan, tokens)
    keys = torch.arange(float(tokens)).view(1, 1, tokens, 1).expand(1, 2, tokens, 8).contiguous()
    query = numbers(1, 4, tokens, 8)
    state.prefill(query, keys, keys, 0.1)
    assert state.keys is not None
    assert sizes.rest is not None
    expected = [*range(sizes.sinks), *range(tokens - sizes.rest + sizes.sinks, tokens)]
    assert state.keys[0, 1, :, 0].tolist() == expected
    for policy in ("h2o", "snapkv", "tova"):
        state = KvState(KvPlan(0.125, policy), tokens)
        state.prefill(query, keys + numbers(*keys.shape) * 1e-3, keys, 0.1)
        assert state.values is not None
        kept = state.values[0, :, :, 0]
        assert torch.equal(kept[:, : sizes.sinks], torch.arange(float(sizes.sinks)).expand(2, -1))
        assert torch.equal(kept[:, -sizes.window :], torch.arange(float(tokens - sizes.window), tokens).expand(2, -1))


def one_round(policy: str, tokens: int = 64, pool: int = 7) -> tuple[KvState, Tensor, Tensor, list[list[int]]]:
    """A prompt that is evicted once, with values that name their tokens, and what each KV head kept."""
    plan = KvPlan(0.25, policy, block=tokens, pool=pool)
    state = KvState(plan, tokens)
    state.sizes = replace(state.sizes, block=tokens, window=4)
    query, key = numbers(1, 4, tokens, 8), numbers(1, 2, tokens, 8, seed=3)
    value = torch.arange(float(tokens)).view(1, 1, -1, 1).expand(1, 2, tokens, 8).contiguous()
    state.prefill(query, key, value, 8**-0.5)
    assert state.values is not None
    return state, query, key, state.values[0, :, :, 0].int().tolist()


def attention_of(query: Tensor, key: Tensor) -> Tensor:
    """[KV heads, query heads of each, T, T] in float64, causal."""
    tokens = query.shape[2]
    logits = query[0].double().view(2, 2, tokens, 8) @ key[0].double()[:, None].transpose(2, 3) * 8**-0.5
    return logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def best_between(state: KvState, scores: Tensor) -> list[int]:
    """The tokens that a score for every token keeps."""
    sizes, tokens = state.sizes, len(scores)
    assert sizes.rest is not None
    between = range(sizes.sinks, tokens - sizes.window)
    best = sorted(between, key=lambda i: -float(scores[i]))[: sizes.rest - sizes.sinks - sizes.window]
    return [*range(sizes.sinks), *sorted(best), *range(tokens - sizes.window, tokens)]


def test_h2o_keeps_what_received_most_attention_for_each_query_that_saw_it() -> None:
    state, query, key, kept = one_round("h2o")
    seen_by = attention_of(query, key)
    for head in range(2):
        assert kept[head] == best_between(state, seen_by[head].sum((0, 1)) / torch.arange(64, 0, -1))


def test_tova_keeps_what_the_last_query_attends_to_alike_in_all_heads() -> None:
    state, query, key, kept = one_round("tova")
    assert kept[0] == kept[1] == best_between(state, attention_of(query, key)[:, :, -1].mean((0, 1)))


@pytest.mark.parametrize("pool", [1, 7])
def test_snapkv_scores_are_those_of_the_kernel(pool: int) -> None:
    state, query, key, kept = one_round("snapkv", pool=pool)
    window = state.sizes.window
    scores = kv_evict.reference(query[:, :, -window:], key, 8**-0.5, pool)[0]
    for head in range(2):
        # neighbours share a maximum, and ties may go either way: the kept ones score no less than the others
        chosen = torch.tensor(kept[head][state.sizes.sinks : -window])
        rest = torch.tensor(sorted(set(range(state.sizes.sinks, 64 - window)) - set(chosen.tolist())))
        assert scores[head][chosen].min() >= scores[head][rest].max() - 1e-6


def test_h2o_counts_go_on_over_blocks_and_generated_tokens() -> None:
    """With room for everything nothing is evicted, so that the sums are those of the whole text."""
    tokens = 64
    state = KvState(KvPlan(0.99, "h2o"), tokens)
    state.sizes = replace(state.sizes, budget=200)
    query, key = numbers(1, 4, tokens, 8), numbers(1, 2, tokens, 8, seed=3)
    state.prefill(query[:, :, :40], key[:, :, :40], key[:, :, :40], 8**-0.5)
    for i in range(40, tokens):
        state.decode(query[:, :, i : i + 1], key[:, :, i : i + 1], key[:, :, i : i + 1], 8**-0.5)
    assert state._mass is not None
    assert state._queried is not None
    torch.testing.assert_close(state._mass[0].double(), attention_of(query, key).sum((1, 2)), rtol=1e-5, atol=1e-6)
    assert state._queried[0, 0].tolist() == list(range(tokens, 0, -1))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_values_are_rounded_as_the_kernels_pack_them(bits: int) -> None:
    keys, values = numbers(2, 3, 64, 16).half(), numbers(2, 3, 64, 16, seed=1).half()
    packed = attention_decode.pack(attention_decode.Cache(keys, values), bits, 16)
    expected = packed.dense(torch.float32)
    torch.testing.assert_close(rounded(keys.float().view(2, 3, 4, 16, 16), bits, 3).flatten(2, 3), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rounded(values.float(), bits, 3), expected[1], rtol=1e-6, atol=1e-6)
    sizes = [[part.numel() * part.element_size() // 2 for part in parts] for parts in (
        (packed.keys, packed.key_scale, packed.key_minimum), (packed.values, packed.value_scale, packed.value_minimum))]  # fmt: skip
    assert sum(sizes[0]) == packed_bytes(3, 16, 64, bits, 16, by_channel=True)
    assert sum(sizes[1]) == packed_bytes(3, 16, 64, bits, 16, by_channel=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_caches_are_scored_and_rounded_in_float32(dtype: torch.dtype) -> None:
    tokens = 400  # more than bfloat16 counts exactly
    query, key = numbers(1, 4, tokens, 8).to(dtype), numbers(1, 2, tokens, 8, seed=3).to(dtype)
    narrow, wide = (KvState(KvPlan(0.5, "h2o"), tokens) for _ in range(2))
    output = narrow.prefill(query, key, key, 8**-0.5)
    expected = wide.prefill(query.float(), key.float(), key.float(), 8**-0.5)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert narrow.keys is not None
    assert wide.keys is not None
    assert torch.equal(narrow.keys.float(), wide.keys)
    assert torch.equal(rounded(key, 4, 3), rounded(key.float(), 4, 3).to(dtype))


def test_lengths_shrink_with_the_context() -> None:
    plan = KvPlan(0.0625)
    for tokens in (64, 128, 256, 512, 1024, 2048, 1 << 17):
        sizes = plan.sizes(tokens)
        assert sizes.budget is not None
        assert sizes.least <= sizes.budget
    large, small = plan.sizes(1 << 17), plan.sizes(256)
    assert (large.sinks, large.window, large.block, large.interval, large.group, large.recent) == (4, 32, 512, 16, 32, 32)
    assert (small.sinks, small.window, small.block, small.interval, small.group, small.recent) == (4, 8, 32, 4, 16, 8)


@torch.no_grad()
def test_parts_of_a_plan_come_and_go_in_any_order(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    name = attentions(model)[1]
    config, before = model.get_submodule(name).config, dict(vars(model.get_submodule(name)))
    keys = plan_part(model, name, "keys", {"key_bits": 4})
    values = plan_part(model, name, "values", {"value_bits": 2})
    assert plans_of(model)[0][1] == KvPlan(key_bits=4, value_bits=2)
    keys()
    assert plans_of(model)[0][1] == KvPlan(value_bits=2)
    values()
    assert vars(model.get_submodule(name)) == before
    assert model.get_submodule(name).config is config is model.config


@torch.no_grad()
def test_watching_shows_the_attention_and_changes_nothing(tiny_model: Callable[..., Any]) -> None:
    model, ids, found = tiny_model("llama"), text(), {}
    expected = model(ids).logits
    with watched(model, attentions(model), lambda name, seen_by: found.update({name: seen_by})):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("eager")
    eager = model(ids, output_attentions=True).attentions
    assert list(found) == attentions(model)
    for seen_by, weights in zip(found.values(), eager, strict=True):
        torch.testing.assert_close(seen_by.flatten(1, 2), weights, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_texts_too_short_for_their_budget_keep_what_must_stay(tiny_model: Callable[..., Any], policy: str) -> None:
    model = tiny_model("llama")
    with under(model, share=0.1, policy=policy):
        for length in (1, 2, 3, 5):
            assert model(text(length)).logits.isfinite().all()


@torch.no_grad()
def test_prompts_of_different_lengths_are_refused(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model("llama"), text()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with under(model, share=0.5), pytest.raises(InputError, match="prompts of one length"):
        model(ids, attention_mask=mask, past_key_values=KvCache(model, CONTEXT))


@torch.no_grad()
def test_beams_take_their_caches_along(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    with under(model, share=0.5, policy="h2o"):
        cache = KvCache(model, CONTEXT)
        model(text(), past_key_values=cache)
        before = [state.keys.clone() for state in cache.states if state.keys is not None]
        cache.reorder_cache(torch.tensor([1, 0]))
        for keys, state in zip(before, cache.states, strict=True):
            assert state.keys is not None
            assert torch.equal(state.keys, keys.flip(0))
