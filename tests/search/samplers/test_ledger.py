"""The integer book-keeping against the exact cost model, and repairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoeff.search.limits import Limit, feasible, parse_limit
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.problem import stream

Make = Callable[..., Any]
LOOSE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LOOSE
@given(seed=st.integers(0, 1000), share=st.integers(15, 100))
def test_slack_is_exact_and_repairs_end_within_the_limits(toy: Make, seed: int, share: int) -> None:
    problem = toy(3, skip=True).problem
    limits = [parse_limit(f"linear_bytes<={share / 100}x", problem.cost_model), parse_limit("avg_bits<=9", problem.cost_model)]
    ledger = Ledger(problem.space, problem.cost_model, limits)
    rng = stream(seed)
    start = tuple(rng.randrange(len(d.levels)) for d in problem.space.decisions)
    assert ledger.feasible(start) == feasible(limits, problem.cost_model, start)
    repaired = ledger.repaired(start, rng)
    assert feasible(limits, problem.cost_model, repaired)
    if feasible(limits, problem.cost_model, start):
        assert repaired == problem.space.normalised(start)
    filled = ledger.filled(repaired, rng)
    assert feasible(limits, problem.cost_model, filled)
    for i, on in enumerate(problem.space.active(filled)):
        if on and filled[i] > 0:
            raised = [*filled[:i], filled[i] - 1, *filled[i + 1 :]]
            assert not feasible(limits, problem.cost_model, raised)


def test_the_same_seed_repairs_the_same(toy: Make) -> None:
    problem = toy(4).problem
    ledger = Ledger(problem.space, problem.cost_model, problem.cost_limits)
    dense = [0] * len(problem.space.decisions)
    assert ledger.repaired(dense, stream(5, "x")) == ledger.repaired(dense, stream(5, "x"))
    assert len({ledger.repaired(dense, stream(n)) for n in range(8)}) == 8


def test_limits_that_nothing_keeps_are_an_error(toy: Make) -> None:
    problem = toy(2).problem
    impossible = Limit("linear_bytes", problem.cost_model.dense("linear_bytes") / 100, "")
    with pytest.raises(ValueError, match="no configuration"):
        Ledger(problem.space, problem.cost_model, [impossible]).repaired([0] * 6, stream(0))


def test_without_limits_everything_fits(toy: Make) -> None:
    problem = toy(2).problem
    ledger = Ledger(problem.space, problem.cost_model, [parse_limit("kl<=1", problem.cost_model)])
    assert ledger.feasible([5] * 6)
    assert ledger.filled([5] * 6, stream(0)) == (0,) * 6
