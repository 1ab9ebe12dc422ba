"""EVA: ranks follow the directions that explain the inputs, within the limit."""

from __future__ import annotations

from fractions import Fraction

import torch

from autoeff.evaluators.calibration import explained
from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.search.allocators.eva import Eva
from autoeff.search.limits import Limit
from autoeff.search.samplers.problem import Problem
from autoeff.search.seed import Given
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

RANKS = (4, 3, 2, 1, 0)
SIZES = (10, 10, 30)  # parameters of one term
INPUTS = {"s0": (0.5, 0.3, 0.15, 0.05), "s1": (0.9, 0.06, 0.03, 0.01), "s2": (0.4, 0.35, 0.2, 0.05)}


def ranks(limit: int, inputs: dict[str, tuple[float, ...]]) -> list[int]:
    decisions = tuple(
        Decision(f"s{i}", "lora_rank", i, RANKS, {(): tuple({"trainable_parameters": (r - 4) * size} if r < 4 else {} for r in RANKS)})
        for i, size in enumerate(SIZES)
    )
    dense = {
        "linear_bytes": 800, "linear_parameters": 400, "other_bytes": 0, "lookup_bytes": 0, "kv_bytes_per_token": 0, "flops_per_token": 1,
        "trainable_parameters": 200, "adapter_bytes": 400,
    }  # fmt: skip
    space = SearchSpace(decisions, dense)
    limits = (Limit("trainable_parameters", Fraction(limit), "limit"),)
    problem = Problem(space, CostModel(space, batch=1, context=1), limits, ("kl",), 100, 8, 0)
    damage = [[0.0, 0.1, 0.2, 0.4, 1.0]] * 3
    found = Eva().configuration(Given(problem, limits, damage, statistics=ModelStatistics(inputs=inputs)))
    assert found is not None
    assert problem.feasible(found)
    return [RANKS[i] for i in found]


def test_the_greatest_ratios_get_the_terms() -> None:
    """In one list: .9 of s1 (10), .5 of s0 (10), .4 of s2 (30), .35 of s2 (30), .3 of s0 (10), .2 of s2 (30)."""
    assert ranks(90, INPUTS) == [2, 1, 2]
    assert ranks(200, INPUTS) == [4, 4, 4]


def test_what_a_limit_leaves_is_used() -> None:
    """25 more than two terms take: another term of s0 or s1 fits, one of s2 does not."""
    found = ranks(45, {"s0": (0.1, 0.1, 0.1, 0.1), "s1": (0.2, 0.1, 0.1, 0.1), "s2": (0.9, 0.01, 0.01, 0.01)})
    assert sum(rank * size for rank, size in zip(found, SIZES, strict=True)) == 40
    assert found[2] == 1


def test_ratios_are_shares_of_the_second_moment() -> None:
    inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 2, 1, 0.5, 0])
    found = explained(inputs.T @ inputs / 200)
    values = torch.linalg.svdvals(inputs.double()) ** 2
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), values / values.sum(), rtol=1e-4, atol=1e-6)
    assert explained(torch.zeros(3, 3)) == (0.0, 0.0, 0.0)
    assert ModelStatistics.from_json(ModelStatistics(inputs={"s": found}).to_json()).inputs == {"s": found}
