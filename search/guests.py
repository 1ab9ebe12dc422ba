"""What every search evaluates before its sampler is asked: dense, uniform levels, the damage table, the additive optimum, random.

They are the baselines that a found configuration must beat, and every sampler starts from what they measured (design: law 4).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import exp, inf, log
from typing import Literal

from autoeff.search.allocators.dp import Allocator
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.problem import Candidate, Problem, stream
from autoeff.spaces.space import Decision, SearchSpace

__all__ = [
    "DamageTable",
    "Key",
    "Proposing",
    "TableForm",
    "finalists",
    "full_table_trials",
    "left_to_search",
    "minimum_trials",
    "preamble",
    "table_candidates",
    "table_form",
]

TableForm = Literal["full", "quarter", "cheap"]
"""Every level on all windows; every level on a quarter of them; two levels of each decision on a quarter of them."""

_FORMS: tuple[TableForm, ...] = ("full", "quarter", "cheap")
_AFTER_TABLE = 5  # evaluations that a budget must leave
_RANDOM, _REDRAWS = 32, 4  # most random guests, and draws for each before small spaces count as exhausted
_LEAST_DAMAGE = 1e-12  # stands for "no damage seen" where a logarithm is taken

Key = tuple[tuple[int, ...], int]
"""Normalised level indices and windows: what names an evaluation."""
Proposing = Generator[list[Candidate], Sequence[float | None], list[Candidate]]
"""What must be measured on the way, batch by batch, and what is proposed in the end."""


def table_form(space: SearchSpace, trials: int, windows: int) -> TableForm:
    """The richest form of the damage table that takes at most a third of the budget, else the cheap one.

    Args:
        space: The decisions.
        trials: Budget in full-token equivalents.
        windows: Windows of the search text.
    """
    return next((form for form in _FORMS if 3 * _table_cost(space, form, windows) <= trials), "cheap")


def full_table_trials(space: SearchSpace) -> int:
    """The least budget whose table takes the full form."""
    return -(-3 * _table_cost(space, "full", 1) // 1)


def minimum_trials(space: SearchSpace, windows: int) -> int:
    """The least budget in full-token equivalents: dense, uniform levels, the cheap table and five more."""
    return 1 + len(space.uniform) + -(-_table_cost(space, "cheap", windows) // 1) + _AFTER_TABLE


def left_to_search(problem: Problem) -> int:
    """Evaluations that are left to the sampler when no two guests are equal; rules among them are not counted."""
    space, trials, windows = problem.space, problem.trials, problem.windows
    spent = 1 + len(space.uniform) + _table_cost(space, table_form(space, trials, windows), windows) + len(problem.operating_points)
    return int(trials - spent - _random_count(trials, spent))


def preamble(
    problem: Problem, *, table_only: bool = False, seeds: Callable[[DamageTable], Proposing] | None = None
) -> Generator[list[Candidate], Sequence[float | None], None]:
    """Yields the guests in batches, and takes back the quality of each batch, in its order; None stands for a failure.

    The batches are: dense and every uniform level; the damage table; the additive optimum at each operating point; what `seeds`
    makes of the table and of what it has measured on the way, at most half of what is left; random
    configurations within the limits of each operating point, `min(32, N/5)` in all and at most half of what is left. With
    `table_only` they are dense and the damage table.
    """
    known: dict[Key, float | None] = {}
    full = problem.windows
    zero = tuple([0] * len(problem.space.decisions))
    uniform = [(problem.space.indices(c.levels), name) for name, c in problem.space.uniform.items()]
    dense = Candidate(zero, full, "dense")
    yield from _asked([dense] if table_only else [dense, *(Candidate(indices, full, "uniform", name) for indices, name in uniform)], known)
    yield from _asked(table_candidates(problem), known)
    if table_only:
        return
    yield from _asked(_additive(problem, known), known)
    if seeds is not None:
        yield from _seeds(problem, known, seeds(DamageTable.measured(problem, known)))
    yield from _asked(_random(problem, _spent(problem, known)), known)


@dataclass(frozen=True)
class DamageTable:
    """The quality that each level loses alone.

    Attributes:
        damage: For each decision and level; 0 for dense, infinity where the level alone fails.
    """

    damage: tuple[tuple[float, ...], ...]

    @classmethod
    def measured(cls, problem: Problem, known: Mapping[Key, float | None]) -> DamageTable:
        """The table in the form that the budget allows, from evaluations that `preamble` asked for."""
        windows, rows = _plan(problem.space, problem.trials, problem.windows)
        damage = []
        for i, (decision, levels) in enumerate(zip(problem.space.decisions, rows, strict=True)):
            values = {level: known.get((_alone(problem.space, i, level), windows)) for level in levels}
            damage.append(_completed(decision, {level: inf if value is None else value for level, value in values.items()}))
        return cls(tuple(damage))

    def predicted(self, space: SearchSpace, indices: Sequence[int]) -> float:
        """What a configuration loses if damages add up."""
        return sum(row[i] for row, i, on in zip(self.damage, indices, space.active(indices), strict=True) if on)


def table_candidates(problem: Problem) -> list[Candidate]:
    """One candidate for each entry that is measured: that level alone, everything else dense."""
    windows, rows = _plan(problem.space, problem.trials, problem.windows)
    return [Candidate(_alone(problem.space, i, level), windows, "table") for i, levels in enumerate(rows) for level in levels]


def finalists(problem: Problem, values: Mapping[tuple[int, ...], float], count: int = 8) -> list[tuple[int, ...]]:
    """The distinct configurations to be judged on held-out text: the best at each operating point, `count` in all.

    Args:
        problem: Its limits hold, those on quality too.
        values: Quality at full fidelity, by normalised level indices.
        count: Shared among the operating points; each gets at least two.
    """
    ranked = sorted((value, indices) for indices, value in values.items())
    ranked = [(v, x) for v, x in ranked if all(limit.met(v) for limit in problem.limits if limit.name == problem.quality)]
    found: dict[tuple[int, ...], None] = {}
    for point in problem.operating_points:
        ledger = Ledger(problem.space, problem.cost_model, point.limits)
        best = [indices for _, indices in ranked if ledger.feasible(indices)]
        found.update(dict.fromkeys(best[: max(2, count // len(problem.operating_points))]))
    return list(found)


def _additive(problem: Problem, known: Mapping[Key, float | None]) -> list[Candidate]:
    damage = DamageTable.measured(problem, known).damage
    found = []
    for point in problem.operating_points:
        indices = Allocator(problem.space, problem.cost_model, point.limits).solve(damage)
        if indices is not None:
            found.append(Candidate(indices, problem.windows, "additive", point.name))
    return found


def _asked(candidates: list[Candidate], known: dict[Key, float | None]) -> Generator[list[Candidate], Sequence[float | None], None]:
    values = yield candidates
    known.update({(c.indices, c.windows): value for c, value in zip(candidates, values, strict=True)})


def _seeds(
    problem: Problem, known: dict[Key, float | None], proposing: Proposing
) -> Generator[list[Candidate], Sequence[float | None], None]:
    """What rules ask for on the way is measured once, and counts as failed where there is no room for it."""
    room = (problem.trials - _spent(problem, known)) / 2
    try:
        batch = next(proposing)
        while True:
            new = [c for c in batch if (c.indices, c.windows) not in known]
            if new and (cost := Fraction(sum(c.windows for c in new), problem.windows)) <= room:
                room -= cost
                yield from _asked(new, known)
            batch = proposing.send([known.get((c.indices, c.windows)) for c in batch])
    except StopIteration as end:
        chosen: list[Candidate] = end.value
    yield from _asked(chosen[: max(0, int(room))], known)


def _spent(problem: Problem, known: Mapping[Key, float | None]) -> Fraction:
    return sum((Fraction(windows, problem.windows) for _, windows in known), Fraction(0))


def _random(problem: Problem, spent: Fraction) -> list[Candidate]:
    count = _random_count(problem.trials, spent)
    ledgers = [Ledger(problem.space, problem.cost_model, point.limits) for point in problem.operating_points]
    found: dict[tuple[int, ...], Candidate] = {}
    for n in range(_REDRAWS * count if ledgers else 0):
        if len(found) == count:
            break
        rng = stream(problem.seed, "random", n)
        ledger, point = ledgers[n % len(ledgers)], problem.operating_points[n % len(ledgers)]
        indices = ledger.filled(ledger.repaired(problem.space.sample(rng), rng), rng)
        found.setdefault(indices, Candidate(indices, problem.windows, "random", point.name))
    return list(found.values())


def _random_count(trials: int, spent: Fraction) -> int:
    return min(_RANDOM, trials // 5, int((trials - spent) / 2))


def _plan(space: SearchSpace, trials: int, windows: int) -> tuple[int, list[list[int]]]:
    """Windows and levels of the table's measurements."""
    return _measurements(space, table_form(space, trials, windows), windows)


def _measurements(space: SearchSpace, form: TableForm, windows: int) -> tuple[int, list[list[int]]]:
    rows = [list(range(1, len(d.levels))) for d in space.decisions]
    if form == "cheap":
        rows = [[len(row) // 2 + 1, row[-1]] if len(row) > 2 else row for row in rows]
    return windows if form == "full" else max(1, windows // 4), rows


def _table_cost(space: SearchSpace, form: TableForm, windows: int) -> Fraction:
    used, rows = _measurements(space, form, windows)
    return Fraction(used, windows) * sum(map(len, rows))


def _alone(space: SearchSpace, decision: int, level: int) -> tuple[int, ...]:
    return tuple(level if i == decision else 0 for i in range(len(space.decisions)))


def _completed(decision: Decision, values: Mapping[int, float]) -> tuple[float, ...]:
    """Damage of every level: log-linear in its cost through the two measured ones, which bits follow within a few percent."""
    missing = [level for level in range(1, len(decision.levels)) if level not in values]
    if not missing:
        return (0.0, *(values[level] for level in range(1, len(decision.levels))))
    (a, at_a), (b, at_b) = values.items()
    costs = _costs(decision)
    if inf in (at_a, at_b) or costs[a] == costs[b]:
        slope = 0.0
        at_a = min(at_a, at_b)
    else:
        slope = (log(max(at_b, _LEAST_DAMAGE)) - log(max(at_a, _LEAST_DAMAGE))) / (costs[b] - costs[a])
    through = [max(at_a, _LEAST_DAMAGE) * exp(slope * (cost - costs[a])) for cost in costs]
    return (0.0, *(values.get(level, through[level]) for level in range(1, len(decision.levels))))


def _costs(decision: Decision) -> list[int]:
    """Cost of each level in the first primary quantity that the knob changes."""
    names = [name for cost in decision.alone for name in cost]
    return [cost.get(names[0], 0) for cost in decision.alone] if names else [0] * len(decision.levels)
