"""The quadratic model against explicit sums, and what it learns from evaluations of a truly quadratic damage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from autoeff.search.allocators.dp import Allocator
from autoeff.search.samplers.damage_model import DamageModel, Form
from autoeff.search.samplers.descent import minimised
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.problem import stream

Make = Callable[..., Any]


@pytest.fixture
def learnt(toy: Make) -> tuple[Any, DamageModel, list[tuple[int, ...]], list[float]]:
    """A toy, its model with the true damages alone as prior, and 150 evaluations close to one configuration."""
    some = toy(5, skip=True)
    space = some.problem.space
    alone = [[float(v @ v) for v in row[: len(d.levels)]] for row, d in zip(some.vectors, space.decisions, strict=True)]
    rng = stream(0, "test")
    near = []
    for _ in range(150):
        x = [4 if d.knob == "bits" else 0 for d in space.decisions]
        for _ in range(4):
            i = rng.randrange(len(x))
            x[i] = rng.choice((3, 4, 5)) if space.decisions[i].knob == "bits" else rng.randrange(2)
        near.append(space.normalised(x))
    near = list(dict.fromkeys(near))
    return some, DamageModel(space, alone), near, [some.damage(x, some.problem.windows) for x in near]


def test_gains_and_pairs_are_differences_of_the_value() -> None:
    draw = np.random.default_rng(0)
    form = Form(draw.normal(size=7), draw.normal(size=(5, 7)), draw.normal(size=5))
    z = np.array([1.0, 0, 1, 0, 1, 0, 0])
    one = np.eye(7)
    for f in range(7):
        without = z * (1 - one[f])
        assert form.gains(z)[f] == pytest.approx(form.value(without + one[f]) - form.value(without))
    among = form.pairs(np.array([1, 3, 6]))
    for a, f in enumerate((1, 3, 6)):
        for b, g in enumerate((1, 3, 6)):
            together = form.value(one[f] + one[g]) - form.value(one[f]) - form.value(one[g])
            assert among[a, b] == pytest.approx(0.0 if f == g else together)


def test_it_predicts_what_it_has_not_seen_better_than_the_table(learnt: Any) -> None:
    _, model, configurations, values = learnt
    half = len(values) // 2
    posterior = model.posterior(configurations[:half], values[:half], min(values))
    form = posterior.mean()
    truth = np.array(values[half:])
    table = posterior.slope * np.array([model.features(x) @ model.alone for x in configurations[half:]])
    predicted = np.array([form.value(model.features(x)) for x in configurations[half:]])
    assert np.std(predicted - truth) < 0.5 * np.std(table - truth)
    seen = np.array([form.value(model.features(x)) for x in configurations[:half]])
    assert np.sqrt(np.mean((seen / values[:half] - 1) ** 2)) < 0.02


def test_draws_fit_what_is_known_and_differ_elsewhere(learnt: Any) -> None:
    _, model, configurations, values = learnt
    posterior = model.posterior(configurations[:20], values[:20], min(values))
    draws = [posterior.draw(np.random.default_rng(seed)) for seed in range(20)]

    def spread(x: tuple[int, ...]) -> float:
        return float(np.std([form.value(model.features(x)) for form in draws]))

    known, unknown = [np.mean([spread(x) for x in part]) for part in (configurations[:20], configurations[20:])]
    assert known < 0.3 * unknown
    doubled = posterior.draw(np.random.default_rng(0), 2.0).own - posterior.mean().own
    assert doubled == pytest.approx(2.0 * (draws[0].own - posterior.mean().own))


def test_an_uncertain_value_is_followed_less(learnt: Any) -> None:
    _, model, configurations, values = learnt
    wrong = [1.5 * values[0], *values[1:]]
    z = model.features(configurations[0])
    trusted, doubted = (
        model.posterior(configurations, wrong, min(values), [d, *[0.0] * (len(values) - 1)]).mean().value(z) for d in (0.0, 1.0)
    )
    assert abs(doubted - values[0]) < abs(trusted - values[0])


def test_forbidden_levels_are_never_chosen(toy: Make) -> None:
    some = toy(3)
    space, limits = some.problem.space, some.problem.cost_limits
    alone = [[float(v @ v) for v in row[: len(d.levels)]] for row, d in zip(some.vectors, space.decisions, strict=True)]
    for row in alone:
        row[4] = float("inf")
    model = DamageModel(space, alone)
    ledger = Ledger(space, some.problem.cost_model, limits)
    start = tuple([5] * len(space.decisions))
    form = model.posterior([start], [some.damage(start, 8)], some.damage(start, 8)).mean()
    found = minimised(form, model, Allocator(space, some.problem.cost_model, limits), ledger, start, 5)
    assert 4 not in found
    assert found != start


@pytest.mark.parametrize("radius", [1, 2])
def test_the_minimum_is_within_limits_and_radius_and_no_worse_than_any_pair_of_moves(learnt: Any, radius: int) -> None:
    some, model, configurations, values = learnt
    space, problem = some.problem.space, some.problem
    form = model.posterior(configurations, values, min(values)).mean()
    ledger = Ledger(space, problem.cost_model, problem.cost_limits)
    allocator = Allocator(space, problem.cost_model, problem.cost_limits)
    start = ledger.filled(ledger.repaired([4 if d.knob == "bits" else 0 for d in space.decisions], stream(1)), stream(2))
    found = minimised(form, model, allocator, ledger, start, radius)
    value = form.value(model.features(found))
    assert ledger.feasible(found)
    assert value <= form.value(model.features(start))
    assert value < 0.98 * form.value(model.features(start))
    active = space.active(start)
    assert all(abs(a - b) <= radius for a, b, on, still in zip(found, start, active, space.active(found), strict=True) if on and still)
    linears = [i for i, on in enumerate(space.active(found)) if on and not space.children[i]]
    for i in linears:
        for j in linears:
            for a in range(6):
                for b in range(6):
                    moved = list(found)
                    moved[i], moved[j] = a, b
                    near = all(abs(moved[k] - start[k]) <= radius for k in (i, j) if active[k])
                    if near and ledger.feasible(moved):
                        assert form.value(model.features(moved)) >= value - 1e-6 * abs(value)
