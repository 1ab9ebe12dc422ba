"""The plan of the additive search: what to evaluate next, given what was found so far. Knows nothing of Optuna.

A plan is a generator of steps. The candidates of a step do not depend on each other, so they may be evaluated at once and come
back in any order. A step works its candidates out only if they are asked for: replaying a stored history costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from math import inf

from autoeff.search.allocators.dp import Allocator
from autoeff.search.guests import DamageTable
from autoeff.search.limits import Limit
from autoeff.search.samplers.damage_model import DamageModel
from autoeff.search.samplers.evidence import Evaluation, Evidence, Indices
from autoeff.search.samplers.neighbourhood import Neighbourhood
from autoeff.search.samplers.problem import Candidate, Problem, stream

__all__ = ["Plan", "Step", "additive_plan"]

_FRONT_POINTS, _FRONT_SHARE = 60, 4  # optima of the table along the front: at most 60, and a quarter of what is left
_SCREENED, _CONFIRMED = 12, 1  # proposals of a round tried on few windows, and of these evaluated on all
_UNSCREENED = 4  # proposals of a round where there is no cheaper fidelity
_PATIENCE = 3  # rounds without improvement until a budget is settled


@dataclass(frozen=True)
class Step:
    """Candidates that may be evaluated in any order.

    Attributes:
        count: How many; fewer are worked out only where the space is exhausted.
        candidates: Works them out.
    """

    count: int
    candidates: Callable[[], list[Candidate]]


Plan = Generator[Step, Sequence[Evaluation], None]


def additive_plan(problem: Problem, guests: Sequence[Evaluation]) -> Plan:
    """The steps of the additive search; each is sent what became of its candidates.

    1. Optima of the damage table: with no sublayer silenced, and, where a cost is an objective, along the front.
    2. Rounds at the operating points in turn. The damages are estimated again from all evaluations near the best configuration,
       and the optimum is solved again and evaluated; then moves within the limits, drawn from what the evaluations leave
       possible, are screened on few windows, and the best of them evaluated on all.
    3. Where a cost is an objective, an operating point that no longer improves gives its turn to another budget on the front.

    It ends when less than one evaluation on all windows is left.
    """
    evidence = Evidence(problem, guests)
    if not problem.operating_points:
        return
    table = DamageTable.measured(problem, {(e.indices, e.windows): e.value for e in guests})
    model = DamageModel(problem.space, table.damage)
    front = _front(problem, table, evidence)
    seeds = [x for x in dict.fromkeys([*_unsilenced(problem, table), *front]) if x not in evidence.full]
    if seeds := seeds[: evidence.left // problem.windows]:
        evidence.add((yield _seeds(problem, seeds)))
    spare = _budgets(problem, front, evidence)
    places = [Neighbourhood(problem, model, point.limits) for point in problem.operating_points]
    places = [place for place in places if not place.settled(evidence)] or places[:1]
    patience = [_PATIENCE] * len(places)
    turn = 0
    while evidence.left >= problem.windows:
        k = turn % len(places)
        before = places[k].best(evidence)
        yield from _round(problem, places[k], evidence, turn)
        patience[k] = patience[k] - 1 if places[k].best(evidence) == before else _PATIENCE
        if patience[k] <= 0:
            patience[k] = _PATIENCE
            if spare:
                places[k] = Neighbourhood(problem, model, spare.pop(0))
        turn += 1


def _round(problem: Problem, place: Neighbourhood, evidence: Evidence, turn: int) -> Plan:
    """The optimum as it is now known, and screened moves around it."""
    full, few, left = problem.windows, problem.few_windows, evidence.left
    rng = stream(problem.seed, "additive", turn)
    screened = min(_SCREENED, (left - (1 + _CONFIRMED) * full) // few) if few < full else 0
    windows = [full] + [few] * screened if screened > _CONFIRMED else [full] * min(_UNSCREENED, left // full)

    def proposed() -> list[Candidate]:
        found = place.proposals(evidence, rng, len(windows))
        return [Candidate(x, w, "searched") for x, w in zip(found, windows, strict=False)]

    tried = yield Step(len(windows), proposed)
    evidence.add(tried)
    candidates = [e.indices for e in tried if e.windows == few < full and e.value < inf]

    def promising() -> list[Candidate]:
        return [Candidate(x, full, "searched") for x in place.promising(evidence, candidates, _CONFIRMED)]

    if candidates and evidence.left >= _CONFIRMED * full:
        evidence.add((yield Step(min(_CONFIRMED, len(candidates)), promising)))


def _seeds(problem: Problem, indices: Sequence[Indices]) -> Step:
    return Step(len(indices), lambda: [Candidate(x, problem.windows, "searched") for x in indices])


def _unsilenced(problem: Problem, table: DamageTable) -> list[Indices]:
    """The optimum at each operating point with every parent dense: a larger space must not lose what the smaller one has."""
    space = problem.space
    allowed = [{0} if below else range(len(d.levels)) for d, below in zip(space.decisions, space.children, strict=True)]
    found = (Allocator(space, problem.cost_model, point.limits).solve(table.damage, allowed) for point in problem.operating_points)
    return [indices for indices in found if indices is not None]


def _front(problem: Problem, table: DamageTable, evidence: Evidence) -> list[Indices]:
    """Optima of the table along the front, by falling cost; none where no cost is an objective."""
    points = min(_FRONT_POINTS, evidence.left // problem.windows // _FRONT_SHARE)
    if len(problem.objectives) == 1 or points < 1:
        return []
    return Allocator(problem.space, problem.cost_model, problem.cost_limits, problem.cost_measure).front(table.damage, points)


def _budgets(problem: Problem, front: Sequence[Indices], evidence: Evidence) -> list[tuple[Limit, ...]]:
    """The costs of the front's points as limits, beside those of the problem, in an order that halves the gaps between them.

    Under a limit on quality, those come first whose quality is nearest to it: there the least cost is sought.
    """
    order = sorted(range(len(front)), key=lambda i: f"{i:016b}"[::-1])
    if wanted := [limit.bound for limit in problem.limits if limit.name == problem.quality]:
        order.sort(key=lambda i: abs(evidence.full.get(front[i], inf) - float(min(wanted))))
    name = problem.cost_measure
    bounds = [problem.cost_model.exact(name, front[i]) for i in order]
    return [(*problem.cost_limits, Limit(name, bound, f"{name}<={float(bound):g}")) for bound in bounds]
