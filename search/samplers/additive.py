"""The default: exact additive optima, corrected by what evaluations say, and solved again. `plan.py` says how.

This file lets the plan speak as an Optuna sampler. What it proposes follows from the problem and the evaluations alone, so a
resumed search, told its stored trials, goes on as the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from autoeff.search.sampler import WINDOWS, Sampler, distributions
from autoeff.search.samplers.evidence import Evaluation
from autoeff.search.samplers.plan import Plan, Step, additive_plan
from autoeff.search.samplers.problem import Candidate, Problem

__all__ = ["Additive"]


class Additive(Sampler):
    """Evaluates the damage table's optima, learns how levels act in company, and solves for the optimum again and again."""

    name: ClassVar[str] = "additive"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._guests: list[Evaluation] = []
        self._answers: list[Evaluation] = []
        self._plan: Plan | None = None
        self._step = Step(0, list)
        self._taken = 0  # answers that earlier steps were sent
        self._proposed: list[Candidate] | None = None

    def tell(self, indices: tuple[int, ...], windows: int, value: float | None, asked: bool) -> None:
        evaluation = Evaluation(self.problem.space.normalised(indices), windows, inf if value is None else value)
        (self._answers if asked else self._guests).append(evaluation)

    def for_ask(self, number: int) -> BaseSampler:
        return _Decided(self.problem, self.candidate())

    def candidate(self) -> Candidate:
        """The next proposal after everything told so far.

        Raises:
            StopIteration: The budget is spent, everything within the limits is known, or the step waits for its pending proposals.
        """
        self._plan = self._plan or self._begin()
        while len(self._answers) - self._taken >= self._step.count:
            answers = self._answers[self._taken : self._taken + self._step.count]
            self._taken += len(answers)
            self._step, self._proposed = self._plan.send(answers), None
        if self._proposed is None:
            self._proposed = self._step.candidates()
        place = len(self._answers) - self._taken + self.pending
        if place >= len(self._proposed):
            raise StopIteration("everything within the limits is known, or pending")
        return self._proposed[place]

    def _begin(self) -> Plan:
        plan = additive_plan(self.problem, self._guests)
        self._step = next(plan)
        return plan


class _Decided(BaseSampler):
    """Tells Optuna what is decided already."""

    def __init__(self, problem: Problem, candidate: Candidate) -> None:
        self._distributions = distributions(problem)
        self._params: Mapping[str, int] = dict(zip(self._distributions, candidate.indices, strict=True))
        self._windows = candidate.windows if candidate.windows != problem.windows else None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        if self._windows is not None:
            study._storage.set_trial_system_attr(trial._trial_id, WINDOWS, self._windows)
        return dict(self._params)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._params[param_name]
