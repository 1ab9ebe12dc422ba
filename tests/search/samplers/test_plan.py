"""The additive plan: what it finds, what it never does, and that history alone decides what comes next."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from math import inf
from typing import Any

import pytest

from autoeff.search.allocators.dp import Allocator
from autoeff.search.pareto import hypervolume
from autoeff.search.sampler import make_sampler
from autoeff.search.samplers.additive import Additive
from autoeff.search.samplers.problem import Candidate

Make = Callable[..., Any]


def best(toy: Any, candidates: list[Candidate]) -> float:
    return min(float(toy.value(c)) for c in candidates if c.windows == toy.problem.windows and toy.problem.feasible(c.indices))


def proposed(toy: Any, answer: Callable[[Candidate], float] | None = None) -> list[Candidate]:
    return [candidate for _, candidates in toy.searched(answer) for candidate in candidates]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("skip", [False, True])
def test_the_optimum_of_a_small_space_is_found(toy: Make, seed: int, skip: bool) -> None:
    small = toy(2, levels=(16, 4, 3, 2), trials=120, skip=skip, seed=seed)
    space = small.problem.space
    every = {space.normalised(x) for x in product(*(range(len(d.levels)) for d in space.decisions))}
    optimum = min(small.damage(x, small.problem.windows) for x in every if small.problem.feasible(x))
    assert best(small, proposed(small) + [Candidate(e.indices, e.windows, "random") for e in small.guests()]) == pytest.approx(optimum)


@pytest.mark.parametrize("seed", range(2))
def test_it_beats_the_other_samplers_and_the_table_at_equal_budget(toy: Make, seed: int) -> None:
    import optuna

    large = toy(10, trials=150, skip=True, seed=seed)
    problem = large.problem
    found = best(large, proposed(large))
    guests = [e for e in large.guests() if e.windows == problem.windows and problem.feasible(e.indices)]
    assert found < 0.9 * min(e.value for e in guests)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in ("nsga2", "random"):
        study = optuna.create_study()
        sampler = make_sampler(name, problem)
        values = []
        for number in range(60):
            study.sampler = sampler.for_ask(number)
            trial = study.ask({d.key: optuna.distributions.IntDistribution(0, len(d.levels) - 1) for d in problem.space.decisions})
            indices = problem.space.normalised([trial.params[d.key] for d in problem.space.decisions])
            assert problem.feasible(indices)
            values.append(large.damage(indices, problem.windows))
            study.tell(trial, values[-1])
        assert found < min(values)


@pytest.mark.parametrize("trials", [24, 31, 60, 200])
@pytest.mark.parametrize("options", [{}, {"skip": True}, {"objectives": ("kl", "linear_bytes")}, {"limits": ()}])
def test_the_budget_and_the_limits_hold_and_nothing_is_proposed_twice(toy: Make, trials: int, options: dict[str, Any]) -> None:
    some = toy(3, trials=trials, **options)
    guests = some.guests()
    candidates = proposed(some)
    evaluations = {(e.indices, e.windows) for e in guests} | {(c.indices, c.windows) for c in candidates}
    used = sum(windows for _, windows in evaluations)
    assert used <= trials * some.problem.windows
    assert used > (trials - 1) * some.problem.windows
    assert len(evaluations) == len({(e.indices, e.windows) for e in guests}) + len(candidates)
    for candidate in candidates:
        assert some.problem.feasible(candidate.indices)
        assert candidate.indices == some.problem.space.normalised(candidate.indices)
        assert candidate.origin == "searched"


def test_history_alone_decides_what_comes_next(toy: Make) -> None:
    some = toy(3, trials=60, skip=True, objectives=("kl", "linear_bytes"))

    def told(count: int) -> Additive:
        sampler = Additive(some.problem)
        for e in some.guests():
            sampler.tell(e.indices, e.windows, e.value, False)
        for candidate in sequence[:count]:
            sampler.tell(candidate.indices, candidate.windows, some.value(candidate), True)
        return sampler

    sequence = proposed(some)
    for count in range(0, len(sequence), 7):
        assert told(count).candidate() == sequence[count]
    with pytest.raises(StopIteration):
        told(len(sequence)).candidate()


def test_the_order_of_answers_within_a_step_does_not_matter(toy: Make) -> None:
    from autoeff.search.samplers.evidence import Evaluation
    from autoeff.search.samplers.plan import additive_plan

    some = toy(3, trials=50)
    sequences = []
    for shuffle in (False, True):
        plan, found = additive_plan(some.problem, some.guests()), []
        step = next(plan)
        for turn in range(6):
            candidates = step.candidates()
            found.append(candidates)
            answers = [Evaluation(c.indices, c.windows, some.value(c)) for c in candidates]
            if shuffle:
                random.Random(turn).shuffle(answers)
            step = plan.send(answers)
        sequences.append(found)
    assert sequences[0] == sequences[1]


def test_failures_are_survived_and_not_proposed_again(toy: Make) -> None:
    some = toy(3, trials=80)

    def fragile(candidate: Candidate) -> float:
        return inf if sum(candidate.indices) % 3 == 0 else some.value(candidate)

    candidates = proposed(some, fragile)
    assert len({(c.indices, c.windows) for c in candidates}) == len(candidates)
    alive = [c for c in candidates if fragile(c) < inf]
    assert best(some, alive) < min(e.value for e in some.guests() if e.windows == some.problem.windows and some.problem.feasible(e.indices))


def test_a_search_in_which_everything_fails_goes_on_to_its_end(toy: Make) -> None:
    some = toy(3, trials=50)
    assert len(proposed(some, lambda candidate: inf)) > 15


def test_the_optimum_without_skips_is_kept_in_play(toy: Make) -> None:
    some = toy(4, skip=True, limits=("linear_bytes<=0.22x",))
    assert any(not any(c.indices[i] for i, below in enumerate(some.problem.space.children) if below) for c in some.searched()[0][1])


def test_a_cost_objective_gets_a_front(toy: Make) -> None:
    some = toy(5, trials=250, limits=(), objectives=("kl", "linear_bytes"))
    candidates = [c for c in proposed(some) if c.windows == some.problem.windows]
    dense = some.problem.cost_model.dense("linear_bytes")

    def point(indices: tuple[int, ...]) -> tuple[float, float]:
        return float(some.problem.cost_model.exact("linear_bytes", indices) / dense), some.damage(indices, some.problem.windows)

    uniform = [point(some.problem.space.indices(c.levels)) for c in some.problem.space.uniform.values()]
    found = hypervolume([point(c.indices) for c in candidates], (0.6, 2.0))
    seeds = hypervolume([point(c.indices) for c in some.searched()[0][1]], (0.6, 2.0))
    assert seeds > 1.01 * hypervolume(uniform, (0.6, 2.0))
    assert found > seeds


def test_an_exhausted_space_ends_the_search(toy: Make) -> None:
    tiny = toy(1, levels=(16, 4), trials=60, limits=("linear_bytes<=0.8x",))
    evaluated = {e.indices for e in tiny.guests()} | {c.indices for c in proposed(tiny)}
    every = {x for x in product(range(2), repeat=3) if tiny.problem.feasible(x)}
    assert every <= evaluated


def test_an_operating_point_starts_from_the_tables_optimum(toy: Make) -> None:
    some = toy(3)
    optimum = Allocator(some.problem.space, some.problem.cost_model, some.problem.cost_limits)
    from autoeff.search.guests import DamageTable

    table = DamageTable.measured(some.problem, {(e.indices, e.windows): e.value for e in some.guests()})
    assert optimum.solve(table.damage) in {e.indices for e in some.guests()}
