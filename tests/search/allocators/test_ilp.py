"""The integer program finds what the dynamic program finds, which is checked against enumeration."""

from __future__ import annotations

import random
from fractions import Fraction
from math import inf

import pytest

from autoeff.search.allocators.dp import solve
from autoeff.search.allocators.ilp import IntegerProgram
from autoeff.search.limits import Limit, feasible
from autoeff.search.samplers.problem import Problem
from autoeff.search.seed import Given, make_seeds
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Context, Decision, SearchSpace

NAMES = ("linear_bytes", "kv_bytes_per_token")
DENSE = {
    "linear_bytes": 400, "linear_parameters": 200, "other_bytes": 40, "lookup_bytes": 8, "kv_bytes_per_token": 60, "flops_per_token": 90,
}  # fmt: skip


def forest(rng: random.Random) -> tuple[SearchSpace, list[list[float]]]:
    """Six decisions; some silence those below them, or change what they cost."""
    decisions: list[Decision] = []
    table = []
    for i in range(6):
        levels, parent = rng.randint(2, 4), rng.choice([None, *range(i)])
        branches = (0, *(rng.choice([0, 0, 1, None]) for _ in range(levels - 1)))
        contexts: list[Context] = [()]
        if parent is not None:
            above = decisions[parent]
            contexts = [(*context, branch) for context in above.costs for branch in {*above.branches} if branch is not None]
        costs = {c: tuple({n: -rng.randint(-3, 30) for n in NAMES} if level else {} for level in range(levels)) for c in contexts}
        decisions.append(Decision(f"s{i}", "k", i, tuple(range(levels)), costs, parent, branches))
        table.append([0.0, *(rng.choice([0.5, 1.0, 2.0, 4.0, inf]) for _ in range(levels - 1))])
    return SearchSpace(tuple(decisions), DENSE), table


@pytest.mark.parametrize("seed", range(60))
def test_the_optimum_is_that_of_the_dynamic_program(seed: int) -> None:
    rng = random.Random(seed)
    space, table = forest(rng)
    costs = CostModel(space, batch=2, context=3)
    wanted = [("linear_bytes", rng.randint(70, 95)), ("kv_bytes", rng.randint(50, 100))]
    limits = tuple(Limit(name, costs.dense(name) * Fraction(share, 100), f"{name}<={share}%") for name, share in wanted)
    problem = Problem(space, costs, limits, ("kl",), 100, 8, 0)
    expected = solve(space, table, costs, limits)
    found = IntegerProgram().configuration(Given(problem, limits, table))
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert feasible(limits, costs, found)
        assert _total(space, table, found) == pytest.approx(_total(space, table, expected))


def test_it_is_about_every_knob_and_joins_no_search_unasked() -> None:
    assert [seed.name for seed in make_seeds(["ilp", "dp"], ["bits"])] == ["ilp", "dp"]
    assert not {"ilp", "dp"} & {seed.name for seed in make_seeds(None, ["bits", "skip", "sparsity", "kv_budget"])}


def _total(space: SearchSpace, table: list[list[float]], indices: tuple[int, ...]) -> float:
    return sum(row[i] for row, i, on in zip(table, indices, space.active(indices), strict=True) if on)
