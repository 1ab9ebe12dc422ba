"""What a knob earned, on a small space whose damages are known: replacements within the limits, the best of their kind."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import UTC, datetime
from fractions import Fraction
from math import inf

import pytest

from autoeff.search.attribution import Alternative, alternatives, attribution
from autoeff.search.guests import DamageTable
from autoeff.search.limits import Limit
from autoeff.search.results import Results
from autoeff.search.samplers.problem import Problem
from autoeff.search.storage.records import Origin, State, Trial
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import Measurement, Split
from autoeff.spaces.space import Decision, SearchSpace

BITS = (16, 4, 2)
TABLE = DamageTable(((0.0, 0.5), (0.0, 0.1, 0.9), (0.0, 0.9), (0.0, 0.2, 1.5)))


def problem(*, joint: bool = True) -> Problem:
    """Two sublayers that can be skipped, each with a linear of three widths; 60 % of the bytes are allowed."""
    decisions: list[Decision] = []
    for block in range(2):
        parent = None
        if joint:
            parent = len(decisions)
            costs = {(): ({}, {"linear_bytes": -800})}
            decisions.append(Decision(f"b{block}", "skip", block, ("keep", "skip"), costs, None, (0, None), uniform=False))
        context = () if parent is None else (0,)
        costs = {context: ({}, {"linear_bytes": -600}, {"linear_bytes": -700})}
        decisions.append(Decision(f"b{block}.l", "bits", block, BITS, costs, parent))
    dense = {"linear_bytes": 1600, "linear_parameters": 800} | dict.fromkeys(
        ("other_bytes", "lookup_bytes", "kv_bytes_per_token", "flops_per_token"), 0
    )
    space = SearchSpace(tuple(decisions), dense)
    limit = Limit("linear_bytes", Fraction(960), "linear_bytes<=0.6x")
    return Problem(space, CostModel(space, batch=1, context=1), (limit,), ("kl",), 100, 8, 0)


def trial(
    made: Problem, number: int, indices: tuple[int, ...], value: float, origin: Origin = "searched", split: Split = "search"
) -> Trial:
    measured = (Measurement("kl" if split == "search" else "kl_held_out", value, split, 8),)
    now = datetime.now(UTC)
    configuration = made.space.at(indices)
    return Trial(
        number, number, configuration, origin, None, State.SUCCEEDED, split, 8, 1.0, True, measured, None, 1.0, 1, None, True, now, now
    )


def results(made: Problem, trials: Iterable[tuple[tuple[int, ...], float, Origin, Split]]) -> Results:
    return Results(made, [trial(made, number, *fields) for number, fields in enumerate(trials)])


def predicted(x: tuple[int, ...]) -> float:
    return sum(row[i] for row, i in zip(TABLE.damage, x, strict=True))


def same_everywhere(made: Problem, knob: str, x: tuple[int, ...]) -> bool:
    decisions = zip(made.space.decisions, x, made.space.active(x), strict=True)
    levels = {i for decision, i, on in decisions if on and decision.knob == knob}
    return len(levels) <= 1 and (knob == "bits" or levels <= {0})


FOUND = (1, 0, 0, 1)  # the first sublayer skipped, the second at 4 bits
KNOWN: list[tuple[tuple[int, ...], float, Origin, Split]] = [
    ((0, 0, 0, 0), 0.0, "dense", "search"),
    (FOUND, 0.30, "searched", "search"),
    ((0, 2, 0, 1), 0.50, "searched", "search"),
    ((0, 1, 0, 1), 0.55, "searched", "search"),
    (FOUND, 0.33, "searched", "held_out"),
]


def test_alternatives_keep_the_limit_and_are_the_best_of_their_kind_by_the_table() -> None:
    made = problem()
    known = results(made, KNOWN)
    found = alternatives(known, TABLE)
    assert found == [
        Alternative("skip", "keep", "solved again", (0, 1, 0, 1)),
        Alternative("skip", "keep", "as searched", (0, 2, 0, 1)),
        Alternative("bits", 16, "kept", (1, 0, 0, 0)),
        Alternative("bits", 4, "solved again", (0, 1, 0, 1)),
        Alternative("bits", 4, "as searched", FOUND),
    ]
    for knob in ("skip", "bits"):
        solved = next(a.indices for a in found if a.knob == knob and a.rest == "solved again")
        every = (made.space.normalised(x) for x in itertools.product(*(range(len(d.levels)) for d in made.space.decisions)))
        alike = [predicted(x) for x in every if made.feasible(x) and same_everywhere(made, knob, x)]
        assert predicted(solved) == pytest.approx(min(alike))


def test_a_knob_earned_what_its_best_confirmed_replacement_loses_more() -> None:
    made = problem()
    trials = [*KNOWN, ((0, 1, 0, 1), 0.60, "alternative", "held_out"), ((0, 2, 0, 1), 0.52, "alternative", "held_out")]
    said = attribution(results(made, trials), TABLE)  # type: ignore[arg-type]
    assert said is not None
    assert (said["trial"], said["held_out"]) == (1, 0.33)
    rows = {row["knob"]: row for row in said["rows"]}
    assert (rows["skip"]["level"], rows["skip"]["rest"], rows["skip"]["held_out"]) == ("keep", "as searched", 0.52)
    assert rows["skip"]["earned"] == pytest.approx(0.19)
    assert rows["skip"]["costs"]["linear_bytes"] == 300
    assert (rows["bits"]["level"], rows["bits"]["earned"]) == (4, 0)


def test_a_replacement_that_does_better_shows_as_harm_and_does_not_become_the_found_one() -> None:
    made = problem()
    known = results(made, [*KNOWN, ((0, 2, 0, 1), 0.20, "alternative", "held_out")])
    found = known.found(made.operating_points[0])
    assert found is not None
    assert found.number == 1
    said = attribution(known, TABLE)
    assert said is not None
    assert next(row for row in said["rows"] if row["knob"] == "skip")["earned"] == pytest.approx(-0.13)


def test_there_is_nothing_to_tell_with_one_knob_or_nothing_found_or_nothing_confirmed() -> None:
    alone = problem(joint=False)
    table = DamageTable((TABLE.damage[1], TABLE.damage[3]))
    assert alternatives(results(alone, [((1, 1), 0.3, "searched", "search")]), table) == []
    assert alternatives(results(problem(), KNOWN[:1]), TABLE) == []
    assert attribution(results(problem(), KNOWN[:4]), TABLE) is None


def test_a_level_that_fails_alone_is_no_part_of_a_replacement_by_the_table() -> None:
    fails = DamageTable(((0.0, 0.5), (0.0, 0.1, inf), (0.0, inf), (0.0, inf, inf)))
    assert [a.rest for a in alternatives(results(problem(), KNOWN), fails) if a.knob == "skip"] == ["as searched"]
