"""Costs of cache levels to the byte, alone and with what changes the cache besides, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from autoeff.errors import InputError
from autoeff.search.allocators.dp import Allocator
from autoeff.search.limits import feasible, least_reachable, parse_limit
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import make_knob
from autoeff.spaces.kv_cache import packed_bytes
from autoeff.spaces.sites import Structure, find_structure
from autoeff.spaces.space import SearchSpace, SpaceSpec

CONTEXT = 512
HEADS, SIZE = 2, 8  # of the tiny llama
ALL = HEADS * SIZE * 2 * 2 * CONTEXT  # bytes of a layer's keys and values


def structure_of(model: nn.Module, context: int = CONTEXT) -> Structure:
    return coupled(model, find_structure(model))[0].at_context(context)


def space_of(model: nn.Module, knobs: dict[str, dict[str, Any]]) -> SearchSpace:
    return build_space(structure_of(model), SpaceSpec(knobs))[0]


def test_a_share_keeps_so_many_tokens_of_every_sequence(tiny_model: Callable[..., nn.Module]) -> None:
    space = space_of(tiny_model("llama"), {"kv_budget": {}})
    costs = CostModel(space, batch=3, context=CONTEXT)
    assert costs.dense("kv_bytes") == 3 * 3 * ALL
    levels = {decision.key: share for decision, share in zip(space.decisions, (0.5, 0.1875, 1), strict=True)}
    indices = space.indices(levels)
    assert costs.exact("kv_bytes", indices) == 3 * (ALL // 2 + ALL * 3 // 16 + ALL)
    assert costs.exact("bytes_per_token", indices) - costs.dense("bytes_per_token") == ALL // 2 + ALL * 3 // 16 - 2 * ALL
    assert costs.exact("weight_bytes", indices) == costs.dense("weight_bytes")
    assert costs.exact("kv_peak_bytes", indices) - costs.exact("kv_bytes", indices) == 3 * ALL // 8  # a block is an eighth
    assert list(space.uniform)[:2] == ["kv_budget=0.75", "kv_budget=0.5"]


def test_costs_go_on_top_of_whatever_changes_the_cache_besides(tiny_model: Callable[..., nn.Module]) -> None:
    """Skipped attention keeps nothing, fewer heads keep less of each token, and bits are those of the tokens that are kept."""
    space = space_of(
        tiny_model("llama"), {"kv_bits": {}, "kv_budget": {}, "heads": {"criterion": "magnitude"}, "skip": {}, "bits": {"group_size": 8}}
    )
    costs, rng = CostModel(space, batch=1, context=CONTEXT), random.Random(0)
    assert {d.knob: bool(d.parent is not None) for d in space.decisions}["kv_bits"]
    seen = set()
    for _ in range(200):
        levels = space.at(space.sample(rng)).levels
        expected = 0
        for block in range(3):
            name = f"model.layers.{block}.self_attn"
            if levels[f"{name}:skip"] == "skip":
                continue
            heads = round(float(levels[f"{name}:heads"]) * HEADS) or 1
            kept = int(float(levels[f"{name}:kv_budget"]) * CONTEXT)
            packed = max(0, kept - 8 - 16) // 32 * 32  # an interval is a 64th, the recent tokens are a 32nd, groups are of 32 tokens
            for part in ("keys", "values"):
                bits = int(levels[f"{name}.{part}:kv_bits"])
                stored = 2 * heads * SIZE * packed if bits == 16 else packed_bytes(heads, SIZE, packed, bits, 32, by_channel=part == "keys")
                expected += stored + 2 * heads * SIZE * (kept - packed)
            seen.add((heads, kept))
        assert costs.exact("kv_bytes", space.indices(levels)) == expected
    assert len(seen) > 10


def test_one_limit_works_over_bits_and_cache_together(tiny_model: Callable[..., nn.Module]) -> None:
    """Neither knob alone could keep it."""
    model = tiny_model("qwen2")
    knobs: dict[str, dict[str, Any]] = {"kv_budget": {"shares": (0.5, 0.25)}, "bits": {"group_size": 8}}
    both, *alone = (CostModel(space_of(model, chosen), batch=1, context=CONTEXT) for chosen in (knobs, *({k: v} for k, v in knobs.items())))
    limit = parse_limit("bytes_per_token<=0.45x", both)
    assert all(least_reachable(costs, limit.name) > limit.bound for costs in alone)
    found = Allocator(both.space, both, [limit]).solve([[float(i) for i in range(len(d.levels))] for d in both.space.decisions])
    assert found is not None
    assert feasible([limit], both, found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "lru"}, "kv_budget.policy must be one of streaming, h2o, snapkv, tova: got 'lru'"),
        ({"shares": (0.5, 0.75)}, "kv_budget.shares must fall between 1 and 0: got 0.5, 0.75"),
        ({"shares": (1.0, 0.5)}, "kv_budget.shares must fall between 1 and 0"),
        ({"window": 0}, "kv_budget.window must be at least 1: got 0"),
        ({"pool": 4}, "kv_budget.pool must be odd: got 4"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_knob("kv_budget", settings)


def test_a_budget_below_sinks_and_window_is_refused_with_the_least_share(tiny_model: Callable[..., nn.Module]) -> None:
    knobs = {"kv_budget": {"shares": (0.5, 0.04)}}
    with pytest.raises(InputError) as caught:
        space_of(tiny_model("llama"), knobs)
    assert str(caught.value) == (
        "kv_budget.shares: 0.04 of a context of 512 tokens keeps 20, fewer than the 28 that 4 sinks, a window of 16 and 8 new ones take; "
        "give shares from 0.05469, or a longer context"
    )
    with pytest.raises(InputError, match="of a window of 512 tokens keeps 20"):
        make_knob("kv_budget", knobs["kv_budget"]).check_length(CONTEXT)


def test_models_without_a_cache_that_can_be_decided_about_are_refused(
    tiny_model: Callable[..., nn.Module],
) -> None:
    """Encoders keep nothing, attention of falcon cannot be put in its place, and sliding windows below the context have their own rule."""
    for model, name in (
        (tiny_model("bert"), "bert"),
        (tiny_model("falcon"), "falcon"),
        (tiny_model("mistral", sliding_window=64), "mistral"),
    ):
        for knob in ("kv_budget", "kv_bits"):
            with pytest.raises(InputError, match=f"knob {knob} finds nothing to decide about in this {name} model"):
                space_of(model, {knob: {}})
    layers = [d.block for d in space_of(tiny_model("gemma3_text"), {"kv_budget": {}}).decisions]
    assert layers == [1] or layers == [0, 1, 2]


def test_a_window_as_long_as_the_context_slides_never(tiny_model: Callable[..., nn.Module]) -> None:
    assert len(space_of(tiny_model("mistral", sliding_window=CONTEXT), {"kv_budget": {}}).decisions) == 3
