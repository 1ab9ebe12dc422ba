"""Jobs beside each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoeff.dashboard.comparison import best_within, budgets_of, front_of, names_of, settings_of, why_not


def other(shown: Any, **changes: Any) -> Any:
    return replace(shown, job=shown.job.model_copy(update={"job": "f" * 12, **changes}))


def test_only_values_that_mean_the_same_compare(shown: Any) -> None:
    assert why_not([shown, other(shown)]) is None
    text = {**shown.job.preflight["text"], "search": {**shown.job.preflight["text"]["search"], "digest": "0"}}
    assert "search texts differ" in str(why_not([shown, other(shown, preflight={**shown.job.preflight, "text": text})]))
    model = {**shown.job.preflight["model"], "digest": "0"}
    assert "models differ" in str(why_not([shown, other(shown, preflight={**shown.job.preflight, "model": model})]))
    assert "quality" in str(why_not([shown, other(shown, quality="damage_cosine")]))


def test_the_front_leaves_limits_aside(shown: Any) -> None:
    front = front_of(shown)
    costs, values = [point[0] for point in front], [point[1] for point in front]
    assert costs == sorted(costs)
    assert values == sorted(values, reverse=True)


def test_budgets_are_those_of_the_uniform_levels(shown: Any) -> None:
    budgets = budgets_of([shown])
    assert {label for label, _ in budgets} == set(shown.uniform.values())
    assert [cost for _, cost in budgets] == sorted((cost for _, cost in budgets), reverse=True)
    best = best_within(front_of(shown), 3.5)
    assert best is not None
    assert best[0] <= 3.5
    assert best_within(front_of(shown), -1.0) is None


def test_settings_that_differ_are_named(shown: Any) -> None:
    changed = other(shown, spec={**shown.job.spec, "seed": 7, "budget": {"trials": 60, "seconds": None}})
    assert settings_of([shown, changed]) == {"seed": [shown.job.spec["seed"], 7], "budget.trials": [shown.job.budget, 60]}
    assert len(set(names_of([shown, changed]).values())) == 2
