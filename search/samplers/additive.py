"""The default: exact additive optima, corrected by what evaluations say, and solved again.

The damage table gives the exact optimum of additive damage at any budget (`allocators/dp.py`); those optima are evaluated first. From
then on a model that knows the table and learns how levels act in company (`damage_model.py`) is minimised within the limits
around the best configurations so far: its mean first, and where that proposes nothing new, random functions that fit the
evaluations as well (Thompson sampling). Each evaluation near the optimum so re-measures damages there, and the optimum is
solved again.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, ClassVar

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from autoeff.search.allocators.dp import Allocator
from autoeff.search.guests import DamageTable
from autoeff.search.sampler import Sampler, distributions
from autoeff.search.samplers.damage_model import DamageModel
from autoeff.search.samplers.descent import minimised
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.problem import OperatingPoint, Problem, stream

__all__ = ["Additive"]

_BATCH = 4  # proposals from one fit of the model; a fit costs as much as some proposals
_FRONT_SHARE, _FRONT_POINTS = 0.1, 24  # of the budget, and at most: optima along the front where a cost is an objective
_STARTS = 3  # best configurations to descend from
_RADII = (1, 2)  # levels that a decision may move in one descent
_WIDE = 2.5  # times the best: worse evaluations tell nothing of the optimum
_SCALE, _GROWTH, _WIDEST = 0.5, 1.3, 8.0  # deviation of the random functions, raised while they propose nothing new
_TRIES = 40

Indices = tuple[int, ...]


class Additive(Sampler):
    """DP on the damage table, then descent on a learnt model of damage.

    What is proposed depends on the problem, the number of the ask and the evaluations before its batch, on nothing else.
    """

    name: ClassVar[str] = "additive"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._history: list[tuple[Indices, int, float]] = []
        self._guests = 0
        self._batch: tuple[int, list[Indices]] | None = None
        self._points = [(point, Ledger(problem.space, problem.cost_model, point.limits)) for point in problem.operating_points]
        self._allocators: dict[str, Allocator] = {}
        self._model: DamageModel | None = None

    def tell(self, indices: Indices, windows: int, value: float | None, asked: bool) -> None:
        self._history.append((indices, windows, inf if value is None else value))
        self._guests += not asked

    def for_ask(self, number: int) -> BaseSampler:
        first = number - (number - self._guests) % _BATCH
        if self._batch is None or self._batch[0] != first:
            self._batch = (first, self._proposals(first))
        return _Fixed(self.problem, self._batch[1][number - first])

    def _proposals(self, first: int) -> list[Indices]:
        """The batch that begins with ask `first`, from the evaluations before it."""
        known = {indices: value for indices, windows, value in self._history[:first] if windows == self.problem.windows}
        table = DamageTable.measured(self.problem, {(i, w): v for i, w, v in self._history[: self._guests]})
        if self._model is None:
            self._model = DamageModel(self.problem.space, table.damage)
        new = [x for x in self._additive(table) if x not in known][:_BATCH]
        turn = (first - self._guests) // _BATCH
        point, ledger = self._points[turn % len(self._points)]
        while len(new) < _BATCH:
            new.append(self._learnt(self._model, point, ledger, known, new, first + len(new)))
        return new

    def _additive(self, table: DamageTable) -> list[Indices]:
        """Optima of the table: with no sublayer silenced at each operating point, and along the front."""
        problem, found = self.problem, dict[Indices, None]()
        plain = [
            {0} if children else range(len(d.levels)) for d, children in zip(problem.space.decisions, problem.space.children, strict=True)
        ]
        for point, _ in self._points:
            if (indices := self._allocator(point).solve(table.damage, plain)) is not None:
                found[indices] = None
        if len(problem.objectives) > 1:
            count = min(_FRONT_POINTS, int(problem.trials * _FRONT_SHARE))
            along = Allocator(problem.space, problem.cost_model, problem.cost_limits, problem.cost_measure)
            found.update(dict.fromkeys(along.front(table.damage, count)))
        return list(found)

    def _learnt(
        self, model: DamageModel, point: OperatingPoint, ledger: Ledger, known: dict[Indices, float], new: Sequence[Indices], number: int
    ) -> Indices:
        """A configuration that is not known and that the model, or a function as likely, takes for the best nearby."""
        feasible = sorted((value, x) for x, value in known.items() if value < inf and ledger.feasible(x))[:_STARTS]
        rng = stream(self.problem.seed, "additive", number)
        if feasible and feasible[0][0] > 0:
            best = feasible[0][0]
            near = {x: value for x, value in known.items() if any(x) and value < _WIDE * best}
            posterior = model.posterior(list(near), list(near.values()), best)
            draws = np.random.default_rng(rng.getrandbits(64))
            scale = _SCALE
            for trial in range(_TRIES):
                form = posterior.mean() if trial == 0 else posterior.draw(draws, scale)
                _, start = feasible[trial % len(feasible)]
                proposed = minimised(form, model, self._allocator(point), ledger, start, _RADII[trial % len(_RADII)])
                if proposed not in known and proposed not in new:
                    return proposed
                scale = min(scale * _GROWTH, _WIDEST)
        return self._mutated(ledger, feasible[0][1] if feasible else self.problem.space.sample(rng), known, new, number)

    def _mutated(self, ledger: Ledger, start: Indices, known: dict[Indices, float], new: Sequence[Indices], number: int) -> Indices:
        """A random step from `start` within the limits; a known one only where nothing else was found."""
        rng = stream(self.problem.seed, "mutation", number)
        proposed = start
        for trial in range(_TRIES):
            moved = [max(0, level - (rng.random() < 0.1 * (1 + trial))) for level in start]
            proposed = ledger.filled(ledger.repaired(moved, rng), rng)
            if proposed not in known and proposed not in new:
                break
        return proposed

    def _allocator(self, point: OperatingPoint) -> Allocator:
        if point.name not in self._allocators:
            self._allocators[point.name] = Allocator(self.problem.space, self.problem.cost_model, point.limits)
        return self._allocators[point.name]


class _Fixed(BaseSampler):
    """Tells Optuna what is decided already."""

    def __init__(self, problem: Problem, indices: Indices) -> None:
        self._problem = problem
        self._params = dict(zip(distributions(problem), indices, strict=True))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions(self._problem)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return dict(self._params)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._params[param_name]
