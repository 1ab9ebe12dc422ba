"""Sublayers left out one by one, by what is measured on top of those that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import inf

import pytest
import torch

from autoeff.search.allocators.finercut import FinerCut
from autoeff.search.guests import preamble
from autoeff.search.limits import Limit
from autoeff.search.planned import _stepped
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.search.seed import Given
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

SUBLAYERS, WINDOWS = 6, 8
TWO_BY_TWO = torch.rand(SUBLAYERS, SUBLAYERS, generator=torch.Generator().manual_seed(3)).double()


def problem(share: int, trials: int = 200) -> Problem:
    decisions = [
        Decision(f"s{i}", "skip", i, ("keep", "skip"), {(): ({}, {"linear_bytes": -100})}, None, (0, None), uniform=False)
        for i in range(SUBLAYERS)
    ]
    halves = [{(0,): ({}, {"linear_bytes": -50})} for _ in range(SUBLAYERS)]
    decisions += [Decision(f"l{i}", "bits", i, (16, 8), costs, i) for i, costs in enumerate(halves)]
    size = 100 * SUBLAYERS
    dense = {
        "linear_bytes": size,
        "linear_parameters": size // 2,
        "other_bytes": 0,
        "lookup_bytes": 0,
        "kv_bytes_per_token": 0,
        "flops_per_token": 1,
    }
    space = SearchSpace(tuple(decisions), dense)
    return Problem(
        space,
        CostModel(space, batch=1, context=1),
        (Limit("linear_bytes", Fraction(size * share, 100), "limit"),),
        ("kl",),
        trials,
        WINDOWS,
        0,
    )


def lost(gone: Sequence[int]) -> float:
    """Sublayers miss each other, so that what is lost does not add up."""
    return float(TWO_BY_TWO[list(gone)][:, list(gone)].sum())


def quality(candidate: Candidate) -> float:
    gone = [i for i in range(SUBLAYERS) if candidate.indices[i]]
    return lost(gone) + sum(0.5 for i, on in enumerate(candidate.indices[SUBLAYERS:]) if on and i not in gone)


def run(searched: Problem) -> tuple[list[Candidate], list[list[Candidate]]]:
    """Every candidate of the preamble, and the batches that the rule asked for, its proposal last."""

    def proposing(table):  # type: ignore[no-untyped-def]
        (point,) = searched.operating_points
        found = yield from _stepped(FinerCut(), Given(searched, point.limits, table.damage))
        return [] if found is None else [Candidate(found, WINDOWS, "seed", "finercut")]

    steps = preamble(searched, seeds=proposing)
    batches = [next(steps)]
    while True:
        try:
            batches.append(steps.send([quality(c) for c in batches[-1]]))
        except StopIteration:
            break
    return [c for batch in batches for c in batch], [batch for batch in batches if batch and batch[0].origin == "seed"]


@pytest.mark.parametrize("share", [40, 20])
def test_each_step_takes_what_is_missed_least_on_top_of_those_that_are_gone(share: int) -> None:
    searched = problem(share)
    everything, batches = run(searched)
    *asked, [proposal] = batches
    gone: list[int] = []
    for batch in [None, *asked]:  # by brute force; the first step is in the table
        left = [i for i in range(SUBLAYERS) if i not in gone]
        if batch is not None:
            assert [[i for i in range(SUBLAYERS) if c.indices[i]] for c in batch] == [sorted([*gone, i]) for i in left]
            assert not any(any(c.indices[SUBLAYERS:]) for c in batch)
            assert {c.windows for c in batch} == {searched.few_windows}
        gone.append(min(left, key=lambda i: lost([*gone, i])))
    assert [i for i in range(SUBLAYERS) if proposal.indices[i]] == sorted(gone)
    assert len(gone) == sum(map(bool, next(c for c in everything if c.origin == "additive").indices[:SUBLAYERS]))
    assert searched.feasible(proposal.indices)
    alone = sorted(range(SUBLAYERS), key=lambda i: lost([i]))[: len(gone)]
    assert (sorted(gone) != sorted(alone)) == (share == 40)  # what the table alone would have said
    assert len({(c.indices, c.windows) for batch in asked for c in batch}) == sum(map(len, asked))


def test_it_is_silent_where_nothing_goes_where_all_fails_and_where_the_budget_has_no_room() -> None:
    assert not run(problem(100))[1]
    searched = problem(20)
    (point,) = searched.operating_points
    steps = FinerCut().steps(Given(searched, point.limits, [[0.0, 1.0]] * SUBLAYERS + [[0.0, 9.0]] * SUBLAYERS))
    batch = next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send([inf] * len(batch))
    assert end.value.value is None
    assert not run(problem(20, trials=8))[1]
    everything, _ = run(problem(20, trials=40))
    assert sum(Fraction(c.windows, WINDOWS) for c in everything) <= 40
