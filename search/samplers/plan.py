"""The plan of the additive search: which candidates to evaluate next, given what was found so far. Knows nothing of Optuna.

A plan is a generator of steps. Candidates within a step do not depend on each other, so they may be evaluated at once and come
back in any order. A step is worked out only if its candidates are needed: replaying a stored history costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import cycle

from autoeff.search.allocators.dp import Allocator
from autoeff.search.guests import DamageTable
from autoeff.search.samplers.damage_model import DamageModel
from autoeff.search.samplers.neighbourhood import Evidence, Neighbourhood
from autoeff.search.samplers.problem import Candidate, Problem, stream

__all__ = ["Evaluation", "Plan", "Step", "additive_plan"]

_FRONT_POINTS, _FRONT_SHARE = 60, 4  # optima of the table along the front: at most 60, and a quarter of what is left
_SCREENED = 12  # proposals tried on few windows; of these
_CONFIRMED = 2  # are evaluated on all of them
_PATIENCE = 3  # rounds without improvement until a budget counts as settled


@dataclass(frozen=True)
class Evaluation:
    """What became of a candidate; its value is infinite where it failed."""

    indices: tuple[int, ...]
    windows: int
    value: float


@dataclass(frozen=True)
class Step:
    """Candidates that may be evaluated in any order.

    Attributes:
        count: How many.
        candidates: Works them out.
    """

    count: int
    candidates: Callable[[], list[Candidate]]


Plan = Generator[Step, Sequence[Evaluation], None]


def additive_plan(problem: Problem, guests: Sequence[Evaluation]) -> Plan:
    """The steps of the additive search; each is sent the evaluations that it led to.

    1. Optima of the damage table that the guests leave open: with no sublayer silenced, and, where a cost is an objective, along
       the front.
    2. Rounds at each operating point. The damages are re-estimated around the best configurations from all evaluations so far,
       and the optimum is solved again: its solution is evaluated on all windows. Then budget-keeping moves around the best, drawn
       from what the evaluations leave possible, are screened on few windows, and the best of them evaluated on all.
    3. Where a cost is an objective, a budget that no longer improves gives way to others along the front.

    The plan ends when the budget is spent.
    """
    evidence = Evidence(problem, guests=[(e.indices, e.windows, e.value) for e in guests])
    table = DamageTable.measured(problem, evidence.known)
    model = DamageModel(problem.space, table.damage)
    front: list[tuple[int, ...]] = []
    if len(problem.objectives) > 1:
        along = Allocator(problem.space, problem.cost_model, problem.cost_limits, problem.cost_measure)
        front = along.front(table.damage, max(2, min(_FRONT_POINTS, evidence.left // problem.windows // _FRONT_SHARE)))
    seeds = [x for x in dict.fromkeys([*_unsilenced(problem, table), *front]) if (x, problem.windows) not in evidence.known]
    seeds = seeds[: evidence.left // problem.windows]
    if seeds:
        candidates = [Candidate(x, problem.windows, "searched") for x in seeds]
        evidence.add((yield Step(len(seeds), lambda: candidates)))
    places = [Neighbourhood(problem, model, point.limits) for point in problem.operating_points]
    further = _along_front(problem, front, evidence)
    rounds = 0
    for turn in cycle(range(len(places))):
        place = places[turn]
        before = evidence.best(place)
        for share in _round(problem, evidence):
            rng = stream(problem.seed, "additive", rounds, share)
