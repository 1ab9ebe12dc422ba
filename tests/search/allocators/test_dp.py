"""The dynamic program against enumeration, on small spaces with parents and several limits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeff.search.allocators.dp import Allocator, front, solve
from autoeff.search.limits import Limit, feasible
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Context, Decision, SearchSpace

Table = list[list[float]]
NAMES = ("linear_bytes", "kv_bytes_per_token", "flops_per_token")
DENSE = {
    "linear_bytes": 400,
    "linear_parameters": 200,
    "other_bytes": 40,
    "lookup_bytes": 8,
    "kv_bytes_per_token": 60,
    "flops_per_token": 90,
}


def contexts_below(decision: Decision) -> list[Context]:
    return [(*context, branch) for context in decision.costs for branch in {*decision.branches} if branch is not None]


@st.composite
def spaces(draw: st.DrawFn) -> tuple[SearchSpace, Table]:
    """Up to five decisions of up to four levels; some can silence those after them, or change what their levels cost."""
    decisions: list[Decision] = []
    table: Table = []
    for i in range(draw(st.integers(1, 5))):
        levels = draw(st.integers(1, 4))
        parent = draw(st.sampled_from([None, *range(i)]))
        branches = (0, *(draw(st.sampled_from([0, 0, 1, None])) for _ in range(levels - 1)))
        contexts = [()] if parent is None else contexts_below(decisions[parent])
        costs = {c: tuple({n: -draw(st.integers(-3, 20)) for n in NAMES} if level else {} for level in range(levels)) for c in contexts}
        decisions.append(Decision(f"s{i}", "k", i, tuple(range(levels)), costs, parent, branches))
        table.append([0.0, *(draw(st.sampled_from([0.5, 1.0, 2.0, 4.0, inf])) for _ in range(levels - 1))])
    return SearchSpace(tuple(decisions), DENSE), table


LIMITS = st.lists(
    st.tuples(
        st.sampled_from(["linear_bytes", "weight_bytes", "avg_bits", "kv_bytes", "bytes_per_token", "flops_per_token"]),
        st.integers(60, 100),
    ),
    max_size=3,
)


def every(space: SearchSpace) -> Iterator[tuple[int, ...]]:
    yield from {space.normalised(x) for x in product(*(range(len(d.levels)) for d in space.decisions))}


def total(space: SearchSpace, table: Table, indices: tuple[int, ...]) -> float:
    return sum(row[i] for row, i, on in zip(table, indices, space.active(indices), strict=True) if on)


def limits_of(costs: CostModel, wanted: list[tuple[str, int]]) -> list[Limit]:
    return [Limit(name, costs.dense(name) * Fraction(share, 100), f"{name}<={share / 100}x") for name, share in wanted]


@settings(max_examples=150, deadline=None)
@given(spaces(), LIMITS)
def test_the_optimum_is_that_of_enumeration(made: tuple[SearchSpace, Table], wanted: list[tuple[str, int]]) -> None:
    space, table = made
    costs = CostModel(space, batch=2, context=3)
    limits = limits_of(costs, wanted)
    best = min((total(space, table, x) for x in every(space) if feasible(limits, costs, x)), default=inf)
    found = solve(space, table, costs, limits)
    if best == inf:
        assert found is None
    else:
        assert found is not None
        assert feasible(limits, costs, found)
        assert total(space, table, found) == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(spaces(), LIMITS)
def test_the_front_is_that_of_enumeration(made: tuple[SearchSpace, Table], wanted: list[tuple[str, int]]) -> None:
    space, table = made
    costs = CostModel(space, batch=2, context=3)
    limits = limits_of(costs, wanted)
    points = {(costs.exact("weight_bytes", x), total(space, table, x)) for x in every(space) if feasible(limits, costs, x)}
    points = {p for p in points if p[1] < inf}
    expected = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))
    found = [(costs.exact("weight_bytes", x), total(space, table, x)) for x in front(space, table, costs, limits, "weight_bytes", 999)]
    assert found == [(c, pytest.approx(v)) for c, v in reversed(expected)]


@given(spaces())
def test_a_trust_region_is_kept(made: tuple[SearchSpace, Table]) -> None:
    space, table = made
    costs = CostModel(space, batch=1, context=1)
    allowed = [{len(d.levels) - 1} for d in space.decisions]
    found = solve(space, table, costs, [], allowed)
    if found is not None:
        assert all(i == len(d.levels) - 1 for i, d, on in zip(found, space.decisions, space.active(found), strict=True) if on)


@settings(max_examples=60, deadline=None)
@given(spaces(), LIMITS)
def test_a_coarse_grid_keeps_the_limits_too(made: tuple[SearchSpace, Table], wanted: list[tuple[str, int]]) -> None:
    space, table = made
    costs = CostModel(space, batch=2, context=3)
    limits = limits_of(costs, wanted)
    found = Allocator(space, costs, limits, work=40).solve(table)
    assert found is None or feasible(limits, costs, found)
    assert all(feasible(limits, costs, x) for x in Allocator(space, costs, limits, "weight_bytes", work=40).front(table, 9))


def test_a_coarse_grid_wastes_next_to_nothing() -> None:
    """Rounding errors cancel; rounded up, 200 costs would waste half a cell each, here 4 % of the budget."""
    rng = random.Random(0)
    decisions = tuple(
        Decision(
            f"s{i}",
            "bits",
            i,
            (16, 8, 4),
            {(): ({}, {"linear_bytes": -rng.randrange(1, 10**6)}, {"linear_bytes": -rng.randrange(10**6, 2 * 10**6)})},
        )
        for i in range(200)
    )
    space = SearchSpace(decisions, DENSE | {"linear_bytes": 4 * 10**8})
    costs = CostModel(space, batch=1, context=1)
    table = [[0.0, rng.uniform(0.1, 1.0), rng.uniform(1.0, 4.0)] for _ in range(200)]
    limit = Limit("linear_bytes", Fraction(4 * 10**8 - 15 * 10**7), "")
    coarse = Allocator(space, costs, [limit], work=600 * 2500)
    assert not coarse.exact
    found = coarse.solve(table)
    assert found is not None
    assert feasible([limit], costs, found)
    assert limit.bound - costs.exact("linear_bytes", found) < 0.005 * 15 * 10**7


def test_three_hundred_decisions_are_solved_exactly() -> None:
    decisions = tuple(
        Decision(f"s{i}", "bits", i, (16, 8, 4), {(): ({}, {"linear_bytes": -1000 * (1 + i % 3)}, {"linear_bytes": -1500 * (1 + i % 3)})})
        for i in range(300)
    )
    space = SearchSpace(decisions, DENSE | {"linear_bytes": 4000 * 300})
    costs = CostModel(space, batch=1, context=1)
    table = [[0.0, 0.1 * (1 + i % 7), 0.5 * (1 + i % 7)] for i in range(300)]
    limit = Limit("linear_bytes", Fraction(4000 * 300 - 400_000), "")
    allocator = Allocator(space, costs, [limit])
    found = allocator.solve(table)
    assert allocator.exact
    assert found is not None
    assert feasible([limit], costs, found)
    # every decision saves at most 3 bytes a unit of damage more than the greedy order by rate would: the relaxation bounds it
    rates = sorted((t[1] / -d.alone[1]["linear_bytes"], -d.alone[1]["linear_bytes"]) for t, d in zip(table, decisions, strict=True))
    bound, left = 0.0, 400_000
    for rate, saved in rates:
        bound, left = bound + rate * min(saved, left), left - min(saved, left)
    assert bound <= total(space, table, found) <= bound + 1.0
