"""Rules for sparsity: their formulas, the mean that the budget asks for, and levels within the limits."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given as examples
from hypothesis import strategies as st

from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.evaluators.weights import magnitudes_of
from autoeff.search.allocators.alphapruning import AlphaPruning
from autoeff.search.allocators.global_magnitude import GlobalMagnitude
from autoeff.search.allocators.owl import Owl
from autoeff.search.allocators.pq_index import PQIndex
from autoeff.search.allocators.pruning import scaled, share_of_zeros
from autoeff.search.limits import Limit, feasible
from autoeff.search.samplers.problem import Problem
from autoeff.search.seed import Given, make_seeds
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

SITES = [f"layers.{i}" for i in range(6)]
RATIOS = (0, 0.25, 0.5, 0.75)
RULES = ("alphapruning", "global_magnitude", "owl", "pq_index")


def statistics(seed: int = 0) -> ModelStatistics:
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    weights = {site: torch.randn(40, 25, generator=generator) * rng.uniform(0.5, 2) for site in SITES}
    return ModelStatistics(
        magnitudes={site: magnitudes_of([weight]) for site, weight in weights.items()},
        outliers={site: rng.uniform(0, 0.05) for site in SITES},
        spectra={site: rng.uniform(2, 6) for site in SITES},
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("share", [60, 80, 95])
def test_a_rule_keeps_the_limit_and_uses_it(name: str, share: int) -> None:
    costs = tuple({"linear_bytes": round(-2000 * ratio)} for ratio in RATIOS)
    space = SearchSpace(
        tuple(Decision(site, "sparsity", i, RATIOS, {(): costs}) for i, site in enumerate(SITES)),
        {
            "linear_bytes": 12000,
            "linear_parameters": 6000,
            "other_bytes": 0,
            "lookup_bytes": 0,
            "kv_bytes_per_token": 0,
            "flops_per_token": 1,
        },
    )
    model = CostModel(space, batch=1, context=1)
    limits = (Limit("linear_bytes", Fraction(12000 * share, 100), "limit"),)
    damage = [[float(level * (i + 1)) for level in range(len(RATIOS))] for i in range(len(SITES))]
    (rule,) = make_seeds([name], ["sparsity"])
    given = Given(Problem(space, model, limits, ("kl",), 100, 8, 0), limits, damage, statistics=statistics())
    found = rule.configuration(given)
    assert found is not None
    assert feasible(limits, model, found)
    assert not any(feasible(limits, model, [*found[:i], found[i] - 1, *found[i + 1 :]]) for i in range(len(found)) if found[i])


@examples(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=8),
    st.floats(0.01, 0.7),
)
def test_scaled_values_have_the_mean_wherever_it_can_be_reached(layers: list[tuple[float, int]], mean: float) -> None:
    wanted, weights = [w if w > 1e-3 else 0.0 for w, _ in layers], [n for _, n in layers]
    found = scaled(wanted, weights, mean, 0.75)
    assert all(0 <= value <= 0.75 for value in found)
    reachable = sum(n for w, n in zip(wanted, weights, strict=True) if w > 0 or not any(wanted)) * 0.75 / sum(weights)
    assert sum(v * n for v, n in zip(found, weights, strict=True)) / sum(weights) == pytest.approx(min(mean, reachable), abs=1e-6)


def test_owl_spares_outliers_in_a_straight_line_around_the_mean() -> None:
    known = ModelStatistics(outliers={"a": 0.00, "b": 0.01, "c": 0.04})
    found = Owl().wanted(["a", "b", "c"], 0.5, known)
    assert sum(found) / 3 == pytest.approx(0.5)
    assert [found[0] - found[1], found[0] - found[2]] == pytest.approx([0.04, 0.16])
    assert Owl().wanted(["a", "experts", "c"], 0.5, known)[1] == 0.5
    assert Owl().wanted(["a", "a"], 0.5, known) == [0.5, 0.5]


def test_heavy_tails_are_spared() -> None:
    known = ModelStatistics(spectra={"a": 2.0, "b": 3.0, "c": 4.0})
    assert AlphaPruning().wanted(["a", "b", "c"], 0.5, known) == pytest.approx([0.35, 0.5, 0.65])
    assert AlphaPruning().wanted(["b", "b"], 0.5, known) == [0.5, 0.5]


def test_the_index_is_the_share_to_prune() -> None:
    known = ModelStatistics(magnitudes={"flat": magnitudes_of([torch.ones(10)]), "one": magnitudes_of([torch.eye(10)[0]])})
    assert PQIndex().wanted(["flat", "one"], 0.5, known) == pytest.approx([0.0, 0.9])


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.7])
def test_one_threshold_prunes_the_mean_over_all_weights(mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(5000, generator=generator), 0.3 * torch.randn(3000, generator=generator), 1e-4 * torch.ones(3)]
    known = ModelStatistics(magnitudes={str(i): magnitudes_of([weight]) for i, weight in enumerate(weights)})
    found = GlobalMagnitude().wanted(["0", "1", "2"], mean, known)
    threshold = torch.cat(weights).abs().sort().values[round(mean * 8003)]
    assert found[:2] == pytest.approx([float((weight.abs() < threshold).float().mean()) for weight in weights[:2]], abs=2e-3)
    assert found[2] == 0  # four of all weights are the floor, and it has three


def test_zeros_of_levels() -> None:
    assert [share_of_zeros(level) for level in (0, 0.25, "2:4", "1:8")] == [0, 0.25, 0.5, 0.875]
