"""The guests: which there are, in which form the table is measured, and what is judged on held-out text."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from fractions import Fraction
from math import exp, inf
from typing import Any

import pytest

from autoeff.search.guests import DamageTable, finalists, left_to_search, minimum_trials, preamble, table_form
from autoeff.search.limits import parse_limit
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

BITS = (16, 8, 6, 4, 3, 2)


def make(trials: int, *limits: str, linears: int = 6, skips: int = 2, windows: int = 8, **fields: Any) -> Problem:
    decisions = [
        Decision(f"s{i}", "skip", i, ("keep", "skip"), {(): ({}, {"linear_bytes": -400})}, None, (0, None), uniform=False)
        for i in range(skips)
    ]
    costs = tuple({"linear_bytes": 25 * b - 400} if b < 16 else {} for b in BITS)
    decisions += [
        Decision(f"l{i}", "bits", i, BITS, {(0,): costs} if i < skips else {(): costs}, i if i < skips else None) for i in range(linears)
    ]
    size = linears * 400
    dense = {
        "linear_bytes": size,
        "linear_parameters": size // 2,
        "other_bytes": 10,
        "lookup_bytes": 0,
        "kv_bytes_per_token": 0,
        "flops_per_token": size,
    }
    space = SearchSpace(tuple(decisions), dense)
    costs_of = CostModel(space, batch=1, context=1)
    return Problem(space, costs_of, tuple(parse_limit(text, costs_of) for text in limits), ("kl",), trials, windows, 0, **fields)


def damage(problem: Problem, candidate: Candidate) -> float:
    """Exponential in the bits, so that the cheap table's interpolation is exact."""
    rows = zip(problem.space.decisions, candidate.indices, problem.space.active(candidate.indices), strict=True)
    return sum((exp(-1.5 * float(d.levels[x])) if d.knob == "bits" else 0.7) for d, x, on in rows if on and x)


def run(problem: Problem, fails: Sequence[tuple[int, ...]] = ()) -> tuple[list[list[Candidate]], dict[Any, float | None]]:
    steps: Generator[list[Candidate], Sequence[float | None], None] = preamble(problem)
    batches, known = [next(steps)], {}
    while True:
        values = [None if c.indices in fails else damage(problem, c) for c in batches[-1]]
        known.update({(c.indices, c.windows): v for c, v in zip(batches[-1], values, strict=True)})
        try:
            batches.append(steps.send(values))
        except StopIteration:
            return batches, known


def test_the_guests_come_in_order_and_within_the_limits() -> None:
    problem = make(100, "linear_bytes<=0.25x")
    batches, _ = run(problem)
    assert [[c.origin for c in batch] for batch in batches[:3]] == [["dense"] + ["uniform"] * 5, ["table"] * 32, ["additive"]]
    assert {c.origin for c in batches[3]} == {"random"}
    assert len(batches[3]) == len({c.indices for c in batches[3]}) == 20
    assert all(problem.feasible(c.indices) for batch in batches[2:] for c in batch)
    assert [c.label for c in batches[0]] == [None, *(f"bits={b}" for b in BITS[1:])]


@pytest.mark.parametrize(
    ("trials", "form", "cost"), [(96, "full", 32), (95, "quarter", 8), (24, "quarter", 8), (23, "cheap", Fraction(7, 2))]
)
def test_the_table_takes_the_richest_form_within_a_third(trials: int, form: str, cost: Fraction) -> None:
    problem = make(trials, "linear_bytes<=0.25x")
    assert table_form(problem.space, trials, problem.windows) == form
    table = run(problem)[0][1]
    assert sum(Fraction(c.windows, problem.windows) for c in table) == cost
    for candidate in table:
        assert sum(map(bool, candidate.indices)) == 1


@pytest.mark.parametrize("windows", [1, 3, 8])
def test_the_least_budget_holds_the_guests_and_leaves_some(windows: int) -> None:
    space = make(1).space
    least = minimum_trials(space, windows)
    problem = make(least, "linear_bytes<=0.25x", windows=windows)
    used = sum(windows for _, windows in run(problem)[1])
    assert used <= (least - 2) * windows


@pytest.mark.parametrize(("trials", "limits"), [(24, ["linear_bytes<=0.25x"]), (61, ["linear_bytes<=0.25x"]), (200, [])])
def test_what_is_left_to_the_search_is_what_no_guest_takes(trials: int, limits: list[str]) -> None:
    problem = make(trials, *limits)
    used = Fraction(sum(windows for _, windows in run(problem)[1]), problem.windows)
    assert 0 <= int(trials - used) - left_to_search(problem) <= len(problem.operating_points)  # an optimum may be a uniform level


def test_the_cheap_table_follows_the_cost_between_and_beyond_what_it_measures() -> None:
    problem = make(20, "linear_bytes<=0.25x")
    table = DamageTable.measured(problem, run(problem)[1])
    for decision, row in zip(problem.space.decisions, table.damage, strict=True):
        if decision.knob == "bits":
            assert row == pytest.approx([0.0, *(exp(-1.5 * b) for b in BITS[1:])], rel=1e-6)
        else:
            assert list(row) == pytest.approx([0.0, 0.7])


@pytest.mark.parametrize("trials", [20, 60])
def test_a_level_that_fails_alone_is_out(trials: int) -> None:
    problem = make(trials, "linear_bytes<=0.3x", skips=0)
    failing = (5, 0, 0, 0, 0, 0)
    batches, known = run(problem, [failing])
    assert DamageTable.measured(problem, known).damage[0][5] == inf
    (optimum,) = batches[2]
    assert optimum.indices[0] != 5


def test_without_limits_every_uniform_level_is_an_operating_point() -> None:
    problem = make(200)
    batches, _ = run(problem)
    bounds = [point.limits[0].bound for point in problem.operating_points]
    assert [point.name for point in problem.operating_points] == [f"bits={b}" for b in BITS[1:]]
    assert [c.label for c in batches[2]] == [f"bits={b}" for b in BITS[1:]]
    for candidate, bound in zip(batches[2], bounds, strict=True):
        assert problem.cost_model.exact("weight_bytes", candidate.indices) <= bound


def test_the_finalists_are_the_best_that_keep_every_limit() -> None:
    problem = make(100, "linear_bytes<=0.25x", "kl<=1.5")
    values = {c.indices: damage(problem, c) for batch in run(problem)[0] for c in batch if c.windows == problem.windows}
    found = finalists(problem, values, 3)
    allowed = sorted(v for x, v in values.items() if problem.feasible(x) and v <= 1.5)
    assert [values[x] for x in found] == allowed[:3]
    assert len(found) == len(set(found))
    assert all(values[x] > 1e-3 for x in finalists(make(100, "linear_bytes<=0.25x"), values, 100))
