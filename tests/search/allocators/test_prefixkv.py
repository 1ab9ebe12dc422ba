"""One share of the attention for all layers."""

from __future__ import annotations

import pytest

from autoeff.evaluators.model_statistics import AttentionStatistics
from autoeff.search.allocators.cache import Tokens
from autoeff.search.allocators.prefixkv import PrefixKV

CONTEXT = 100


def layer(*received: float) -> AttentionStatistics:
    """From what each token receives, most first; the rest of the context receives nothing."""
    whole, total, mass = sum(received), 0.0, []
    for k in range(CONTEXT):
        total += received[k] if k < len(received) else 0.0
        mass.append(total / whole)
    return AttentionStatistics(tuple(mass), 1, 1)


def test_needed_tokens_rise_with_the_share_and_are_the_least_that_receive_it() -> None:
    rule, layers = PrefixKV(), (layer(*[1.0] * 50), layer(*[2.0**-k for k in range(50)]))
    tokens = Tokens(2, 40, 1, CONTEXT, 0, layers)
    before = [0.0, 0.0]
    for step in range(1, 100):
        found = rule.needed(tokens, step / 100)
        assert all(a <= b for a, b in zip(before, found, strict=True))
        for n, at in zip(found, layers, strict=True):
            assert at.mass[int(n) - 1] >= step / 100 > (at.mass[int(n) - 2] if n > 1 else 0)
        before = found


def test_layers_with_the_same_attention_get_the_same_budget() -> None:
    tokens = Tokens(4, 80, 1, CONTEXT, 0, (layer(*[1.0 / (k + 1) for k in range(CONTEXT)]),) * 4)
    assert PrefixKV().wanted(tokens) == pytest.approx([20] * 4)


def test_flat_attention_gets_more_than_sharp_attention() -> None:
    """Of 40 tokens, 35 even ones hold the share that 5 halving ones do: 1 - 2^-5 is 0.97, 49 of 50 too many."""
    flat, sharp = PrefixKV().wanted(Tokens(2, 40, 1, CONTEXT, 0, (layer(*[1.0] * 50), layer(*[2.0**-k for k in range(50)]))))
    assert flat + sharp == pytest.approx(40)
    share = flat / 50
    assert sharp == pytest.approx(next(n for n in range(1, 50) if 1 - 2.0**-n >= share - 1e-3), abs=1)


def test_masses_of_other_lengths_are_scaled_to_the_context() -> None:
    tokens = Tokens(2, 400, 1, 10 * CONTEXT, 0, (layer(*[1.0] * CONTEXT),) * 2)
    assert PrefixKV().wanted(tokens) == pytest.approx([200, 200])
