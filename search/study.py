"""An Optuna study in memory, rebuilt from our tables: it knows what the sampler must know and stores nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from autoeff.search.sampler import WINDOWS, distributions, make_sampler
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.search.storage.records import State, Trial

__all__ = ["Asked", "Study"]


@dataclass(frozen=True)
class Asked:
    """A proposal.

    Attributes:
        candidate: To be evaluated.
        state: What the sampler noted, to be stored with the trial: system attributes of the Optuna trial and study.
    """

    candidate: Candidate
    state: dict[str, Any]


class Study:
    """Asks one sampler and tells it outcomes, as they come.

    Optuna's trials are the full-fidelity trials on the search text; a failed one is told as failed.

    Args:
        problem: What is searched.
        sampler: Name of the sampler.
    """

    def __init__(self, problem: Problem, sampler: str) -> None:
        self._problem = problem
        self._sampler = make_sampler(sampler, problem)
        self._distributions = distributions(problem)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(directions=["minimize"] * len(problem.objectives))
        self._asked: dict[int, optuna.Trial | None] = {}  # open trials by number; None where an earlier study asked
        self._known: set[tuple[int, ...]] = set()

    def ask(self, number: int) -> Asked | None:
        """The sampler's proposal for trial `number`; None when it has no more, or every configuration of the space is known.

        While others are open, None may also mean: not before one of them has ended.
        """
        self._sampler.pending = len(self._asked)
        if len(self._known) >= self._problem.space.size:
            return None
        try:
            self._study.sampler = self._sampler.for_ask(number)
        except StopIteration:
            return None
        trial = self._study.ask(self._distributions)
        self._asked[number] = trial
        storage, study_id = self._study._storage, self._study._study_id
        params = trial.params  # a copy, each time
        indices = tuple(int(params[key]) for key in self._distributions)
        state = {"trial": dict(storage.get_trial(trial._trial_id).system_attrs), "study": dict(storage.get_study_system_attrs(study_id))}
        windows = int(state["trial"].get(WINDOWS, self._problem.windows))
        return Asked(Candidate(self._problem.space.normalised(indices), windows, "searched"), state)

    def tell(self, trial: Trial) -> None:
        """Adds the outcome of a trial, whether this study asked for it or an earlier one did."""
        if trial.split != "search":
            return
        indices = self._problem.space.indices(trial.configuration.levels)
        value = trial.value(self._problem.quality)
        self._sampler.tell(indices, trial.windows, value, trial.origin == "searched")
        asked = self._asked.pop(trial.number, None)
        if trial.windows != self._problem.windows:
            if asked is not None:  # a cheap fidelity is no value to Optuna
                self._study.tell(asked, state=TrialState.FAIL)
            return
        self._known.add(self._problem.space.normalised(indices))
        values = self._problem.values(indices, trial.value) if trial.state is State.SUCCEEDED else None
        constraints = {} if values is None else self._problem.constraints(trial.value)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        if asked is not None:
            for text, excess in constraints.items():
                asked.set_constraint(text, excess)
            self._study.tell(asked, values, state=state)
            return
        noted: Mapping[str, Any] = trial.sampler_state or {"trial": {}, "study": {}}
        params = dict(zip(self._distributions, indices, strict=True))
        self._study.add_trial(
            create_trial(
                state=state,
                values=values,
                params=params,
                distributions=self._distributions,
                system_attrs=dict(noted["trial"]),
                constraints=constraints,
            )
        )
        for key, item in noted["study"].items():
            self._study._storage.set_study_system_attr(self._study._study_id, key, item)

    def adopt(self, trial: Trial) -> None:
        """Takes up a trial that is still open and that an earlier study asked for."""
        if trial.split == "search":
            self._asked[trial.number] = None
