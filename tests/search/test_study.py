"""A study rebuilt from stored trials asks what the uninterrupted one would have asked, for every sampler."""

from __future__ import annotations

import datetime
import json
from itertools import pairwise
from math import log2

import pytest

from autoeff.search.guests import preamble
from autoeff.search.limits import parse_limit
from autoeff.search.sampler import known_samplers
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.search.storage.records import State, Trial
from autoeff.search.study import Study
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import Measurement
from autoeff.spaces.space import Decision, SearchSpace

BITS = (16, 8, 4, 2)
PROPOSING = sorted(known_samplers().keys() - {"none"})
WHEN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def problem() -> Problem:
    """Three blocks of a sublayer that can be skipped with two linears; limit 40 % of the bytes."""
    decisions = []
    for block in range(3):
        decisions.append(
            Decision(f"b{block}", "skip", block, ("keep", "skip"), {(): ({}, {"linear_bytes": -3200})}, None, (0, None), uniform=False)
        )
        for name, size in (("up", 1000), ("down", 600)):
            costs = tuple({"linear_bytes": size * b // 8 - 2 * size} if b < 16 else {} for b in BITS)
            decisions.append(Decision(f"b{block}.{name}", "bits", block, BITS, {(0,): costs}, parent=3 * block))
    dense = {
        "linear_bytes": 9600,
        "linear_parameters": 4800,
        "other_bytes": 400,
        "lookup_bytes": 0,
        "kv_bytes_per_token": 8,
        "flops_per_token": 9,
    }
    space = SearchSpace(tuple(decisions), dense)
    costs = CostModel(space, batch=1, context=8)
    limits = (parse_limit("linear_bytes<=0.4x", costs),)
    return Problem(space, costs, limits, ("kl", "weight_bytes"), trials=80, windows=8, seed=3)


def damage(problem: Problem, indices: tuple[int, ...]) -> float:
    """Additive with an interaction of neighbours; a skip costs most in the first block."""
    active = problem.space.active(indices)
    alone = [
        (3.0 / (1 + d.block) if d.knob == "skip" else (1 + i) * 2.0 ** -log2(float(d.levels[at]) ** 2)) if at and on else 0.0
        for i, (d, at, on) in enumerate(zip(problem.space.decisions, indices, active, strict=True))
    ]
    return sum(alone) + sum(0.3 * (a * b) ** 0.5 for a, b in pairwise(alone))


def trial(problem: Problem, number: int, candidate: Candidate, state: dict[str, object] | None) -> Trial:
    failed = number % 17 == 16
    measured = () if failed else (Measurement("kl", damage(problem, candidate.indices), "search", 8),)
    outcome = State.FAILED if failed else State.SUCCEEDED
    return Trial(
        number, number, problem.space.at(candidate.indices), candidate.origin, None, outcome, "search",
        candidate.windows, candidate.windows / problem.windows, True, measured, None, 0.1, 1,
        None if state is None else json.loads(json.dumps(state)), False, WHEN, WHEN,
    )  # fmt: skip


def guests(problem: Problem) -> list[Trial]:
    found: list[Trial] = []
    steps = preamble(problem)
    batch = next(steps)
    while True:
        done = [trial(problem, len(found) + k, candidate, None) for k, candidate in enumerate(batch)]
        found += done
        try:
            batch = steps.send([t.value("kl") for t in done])
        except StopIteration:
            return found


@pytest.mark.parametrize("name", PROPOSING)
def test_a_rebuilt_study_asks_the_same(problem: Problem, name: str) -> None:
    def told(trials: list[Trial]) -> Study:
        study = Study(problem, name)
        for item in trials:
            study.tell(item)
        return study

    trials = guests(problem)
    study = told(trials)
    for step in range(4 if name == "gp" else 24):
        asked = study.ask(len(trials))
        if asked is None:
            break
        if step % 3 == 0:
            again = told(trials).ask(len(trials))
            assert again is not None
            assert again.candidate == asked.candidate
        if asked.candidate.windows == problem.windows:
            assert problem.feasible(asked.candidate.indices)
        trials.append(trial(problem, len(trials), asked.candidate, asked.state))
        study.tell(trials[-1])
    assert len(trials) >= len(guests(problem)) + 4


@pytest.mark.parametrize("name", PROPOSING)
def test_pending_proposals_are_not_proposed_again_and_outcomes_may_come_in_any_order(problem: Problem, name: str) -> None:
    trials = guests(problem)
    study = Study(problem, name)
    for item in trials:
        study.tell(item)
    for _ in range(1 if name == "gp" else 6):
        pending = []
        while len(pending) < 3 and (asked := study.ask(len(trials) + len(pending))) is not None:
            pending.append(trial(problem, len(trials) + len(pending), asked.candidate, asked.state))
        assert pending
        assert len({(t.configuration, t.windows) for t in pending}) == len(pending)
        again = Study(problem, name)  # after a crash, the open ones are taken up
        for item in trials:
            again.tell(item)
        for item in pending:
            again.adopt(item)
        one, other = (s.ask(len(trials) + len(pending)) for s in (study, again))
        if name == "additive":  # what comes next depends on them
            assert (one is None) == (other is None)
            assert one is None or other is None or one.candidate == other.candidate
        known = {(t.configuration, t.windows) for t in pending}
        if one is not None:
            assert (problem.space.at(one.candidate.indices), one.candidate.windows) not in known
            pending.append(trial(problem, len(trials) + len(pending), one.candidate, one.state))
        for item in reversed(pending):
            study.tell(item)
        trials += pending


def test_additive_finds_the_best_of_the_space(problem: Problem) -> None:
    def best(name: str) -> float:
        trials = guests(problem)
        study = Study(problem, name)
        for item in trials:
            study.tell(item)
        while sum(t.cost for t in trials) + 1 <= problem.trials and (asked := study.ask(len(trials))) is not None:
            trials.append(trial(problem, len(trials), asked.candidate, asked.state))
            study.tell(trials[-1])
        values = [
            t.value("kl")
            for t in trials
            if problem.feasible(problem.space.indices(t.configuration.levels)) and t.windows == problem.windows
        ]
        return min(v for v in values if v is not None)

    def every(i: int = 0, head: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
        if i == len(problem.space.decisions):
            return [head]
        return [x for level in range(len(problem.space.decisions[i].levels)) for x in every(i + 1, (*head, level))]

    truth = min(damage(problem, x) for x in {problem.space.normalised(x) for x in every()} if problem.feasible(x))
    assert best("additive") == pytest.approx(truth)
