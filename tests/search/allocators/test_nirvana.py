"""The share of the budget that attention and FFNs pay, and one threshold for the units of a kind."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.evaluators.weights import magnitudes_of
from autoeff.search.allocators.nirvana import Nirvana
from autoeff.search.limits import Limit, feasible
from autoeff.search.samplers.problem import Problem
from autoeff.search.seed import Given
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

LAYERS, SHARES = 4, tuple(1 - i / 50 for i in range(50))
WEIGHTS = {"heads": 500, "width": 1500}


def split(share: int, kinds: tuple[str, ...] = ("heads", "width")) -> tuple[dict[str, list[float]], list[torch.Tensor]]:
    """The shares that are cut, by kind and layer, and the scores of the neurons of each layer."""
    places = [(kind, i) for i in range(LAYERS) for kind in kinds]
    scores = {
        place: torch.rand(1000, generator=torch.Generator().manual_seed(n)).double() * (1 + place[1]) for n, place in enumerate(places)
    }
    decisions = tuple(
        Decision(f"{kind}{i}", kind, i, SHARES, {(): tuple({"linear_bytes": -2 * round(WEIGHTS[kind] * (1 - s))} for s in SHARES)})
        for kind, i in places
    )
    size = 2 * LAYERS * sum(WEIGHTS[kind] for kind in kinds)
    dense = {"linear_bytes": size, "linear_parameters": size // 2, "other_bytes": 0, "lookup_bytes": 0, "kv_bytes_per_token": 0}
    space = SearchSpace(decisions, dense | {"flops_per_token": 1})
    model, limits = CostModel(space, batch=1, context=1), (Limit("linear_bytes", Fraction(size * share, 100), "limit"),)
    damage = [[float(level) for level in range(len(SHARES))] for _ in places]
    known = {f"{kind}{i}": replace(magnitudes_of([scores[kind, i]]), weights=WEIGHTS[kind]) for kind, i in places}
    given = Given(Problem(space, model, limits, ("kl",), 100, 8, 0), limits, damage, statistics=ModelStatistics(saliency=known))
    found = Nirvana().configuration(given)
    assert found is not None
    assert feasible(limits, model, found)
    cut: dict[str, list[float]] = {kind: [] for kind in kinds}
    for (kind, _), level in zip(places, found, strict=True):
        cut[kind].append(1 - SHARES[level])
    return cut, [scores["width", i] for i in range(LAYERS)]


@pytest.mark.parametrize("share", [60, 75, 90])
def test_ffns_lose_gamma_times_what_attentions_lose_and_one_threshold_says_where(share: int) -> None:
    cut, scores = split(share)
    heads, width = (sum(shares) / LAYERS for shares in cut.values())
    assert (500 * heads + 1500 * width) / 2000 == pytest.approx(1 - share / 100, abs=0.01)
    of_heads = 2000 * (1 - share / 100) / (500 + 3.36 * 1500)
    assert [heads, width] == pytest.approx([of_heads, 3.36 * of_heads], abs=0.015)  # levels are 0.02 apart
    threshold = torch.cat(scores).sort().values[round(width * 1000 * LAYERS)]
    assert cut["width"] == pytest.approx([float((s < threshold).double().mean()) for s in scores], abs=0.025)


def test_a_kind_alone_pays_all_and_what_neurons_cannot_pay_heads_do() -> None:
    cut, _ = split(70, ("width",))
    assert sum(cut["width"]) / LAYERS == pytest.approx(0.3, abs=0.01)
    cut, _ = split(10)
    assert (500 * sum(cut["heads"]) + 1500 * sum(cut["width"])) / 2000 / LAYERS == pytest.approx(0.9, abs=0.01)
