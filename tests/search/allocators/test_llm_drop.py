"""Sublayers left out in the order of how little they change, until the limits are kept."""

from __future__ import annotations

from fractions import Fraction

from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.search.allocators.llm_drop import LlmDrop
from autoeff.search.limits import Limit
from autoeff.search.samplers.problem import Problem
from autoeff.search.seed import Given
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

BYTES = (100, 300, 100, 300)
CHANGES = (0.30, 0.01, 0.02, 0.40)


def dropped(share: int, *, bits: bool = False, damage: tuple[float, ...] = (1, 1, 1, 1)) -> tuple[int, ...] | None:
    decisions = [
        Decision(f"s{i}", "skip", i, ("keep", "skip"), {(): ({}, {"linear_bytes": -size})}, branches=(0, None))
        for i, size in enumerate(BYTES)
    ]
    table = [[0.0, d] for d in damage]
    if bits:
        halves = [{(0,): ({}, {"linear_bytes": -size // 2})} for size in BYTES]
        decisions += [Decision(f"l{i}", "bits", i, (16, 4), costs, i) for i, costs in enumerate(halves)]
        table += [[0.0, 0.1]] * 4
    dense = {
        "linear_bytes": 800,
        "linear_parameters": 400,
        "other_bytes": 0,
        "lookup_bytes": 0,
        "kv_bytes_per_token": 0,
        "flops_per_token": 1,
    }
    space = SearchSpace(tuple(decisions), dense)
    limits = (Limit("linear_bytes", Fraction(800 * share, 100), "limit"),)
    problem = Problem(space, CostModel(space, batch=1, context=1), limits, ("kl",), 100, 8, 0)
    changes = ModelStatistics(changes={f"s{i}": change for i, change in enumerate(CHANGES)})
    return LlmDrop().configuration(Given(problem, limits, table, statistics=changes))


def test_those_that_change_least_go_first_until_the_limit_is_kept() -> None:
    assert dropped(88) == (0, 1, 0, 0)
    assert dropped(60) == (0, 1, 1, 0)
    assert dropped(40) == (1, 1, 1, 0)


def test_nothing_is_said_where_the_budget_leaves_nothing_out() -> None:
    assert dropped(100) is None


def test_the_rest_is_solved_around_them() -> None:
    found = dropped(40, bits=True, damage=(9, 0.05, 9, 9))
    assert found is not None
    assert found[:4] == (0, 1, 0, 0)
    assert found[7] == 1  # the largest that is left gets fewer bits, and one of the small ones
    assert sum(found[4:7:2]) == 1
