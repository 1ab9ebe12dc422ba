"""What each knob of a found configuration earned: the same budget with that knob set alike everywhere, or not used at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from autoeff.search.allocators.dp import Allocator
from autoeff.search.guests import DamageTable
from autoeff.search.limits import feasible
from autoeff.search.results import Results
from autoeff.search.samplers.problem import OperatingPoint, Problem
from autoeff.spaces.configuration import Level

__all__ = ["Alternative", "alternatives", "attribution"]


@dataclass(frozen=True)
class Alternative:
    """A configuration within the limits in which one knob no longer differs from place to place.

    Attributes:
        knob: That knob.
        level: Its level everywhere; the first level of the knob stands for not using it.
        rest: What became of the other knobs: kept as found, solved again by the damage table, or as some trial of the search had them.
        indices: Level indices, normalised.
    """

    knob: str
    level: Level
    rest: Literal["kept", "solved again", "as searched"]
    indices: tuple[int, ...]


def alternatives(results: Results, table: DamageTable) -> list[Alternative]:
    """For each knob of what was found at the first operating point, at most three: the best of each kind of `rest`, as far as is known.

    None where there is one knob only, or nothing was found: the table at the end of a search says it all then.
    """
    problem = results.problem
    knobs = list(dict.fromkeys(decision.knob for decision in problem.space.decisions))
    point = next((p for p in problem.operating_points if results.found(p) is not None), None)
    if len(knobs) < 2 or point is None:
        return []
    found = results.found(point)
    assert found is not None
    indices = problem.space.indices(found.configuration.levels)
    return [alternative for knob in knobs for alternative in _of_knob(results, table, point, knob, indices)]


def attribution(results: Results, table: DamageTable) -> dict[str, Any] | None:
    """By knob of what was found the best alternative that was confirmed, as plain data; None where there is nothing to tell.

    `earned` is the quality that the alternative loses on held-out text beyond what was found; negative where the knob did harm.
    """
    problem, confirmed = results.problem, results.held_out
    found = next((trial for p in problem.operating_points if (trial := results.found(p)) is not None), None)
    if found is None or results.held_out_quality(found) == inf:
        return None
    name = f"{problem.quality}_held_out"
    rows: dict[str, dict[str, Any]] = {}
    for alternative in alternatives(results, table):
        configuration = problem.space.at(alternative.indices)
        trial = confirmed.get(configuration.digest)
        value = None if trial is None else trial.value(name)
        if trial is None or value is None or value >= rows.get(alternative.knob, {}).get("held_out", inf):
            continue
        rows[alternative.knob] = {
            "knob": alternative.knob,
            "level": alternative.level,
            "rest": alternative.rest,
            "trial": trial.number,
            "held_out": value,
            "earned": value - results.held_out_quality(found),
            "costs": {m.name: m.value for m in problem.cost_model.measurements(alternative.indices)},
        }
    return {"trial": found.number, "held_out": results.held_out_quality(found), "rows": list(rows.values())} if rows else None


def _of_knob(results: Results, table: DamageTable, point: OperatingPoint, knob: str, found: tuple[int, ...]) -> Iterator[Alternative]:
    problem, space = results.problem, results.problem.space
    mine = [i for i, decision in enumerate(space.decisions) if decision.knob == knob]
    kept: list[tuple[float, Alternative]] = []
    solved: list[tuple[float, Alternative]] = []
    allocator = Allocator(space, problem.cost_model, point.limits)
    for level in _levels(problem, mine):
        alike = {i: space.decisions[i].levels.index(level) if level in space.decisions[i].levels else 0 for i in mine}
        same = space.normalised([alike.get(i, x) for i, x in enumerate(found)])
        if feasible((*problem.limits, *point.limits), problem.cost_model, same):
            kept.append((table.predicted(space, same), Alternative(knob, level, "kept", same)))
        allowed = [[alike[i]] if i in alike else range(len(d.levels)) for i, d in enumerate(space.decisions)]
        if (again := allocator.solve(table.damage, allowed)) is not None:
            solved.append((table.predicted(space, again), Alternative(knob, level, "solved again", again)))
    for proposed in (kept, solved):
        if proposed:
            yield min(proposed, key=lambda pair: pair[0])[1]
    for trial in results.within(point.limits):
        indices = space.indices(trial.configuration.levels)
        active = space.active(indices)
        levels = {space.decisions[i].levels[indices[i]] for i in mine if active[i]}
        if len(levels) == 1:
            yield Alternative(knob, levels.pop(), "as searched", indices)
            return


def _levels(problem: Problem, mine: Sequence[int]) -> list[Level]:
    """The levels that people set everywhere: all of a knob that makes baselines, else only that of not using it."""
    decisions = [problem.space.decisions[i] for i in mine]
    if not any(decision.uniform for decision in decisions):
        return [decisions[0].levels[0]]
    return list(dict.fromkeys(level for decision in decisions for level in decision.levels))
