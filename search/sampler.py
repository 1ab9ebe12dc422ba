"""What a sampler is: an Optuna sampler made for one ask; and how Optuna's own are kept within the limits."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any, ClassVar

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.problem import Problem, stream
from autoeff.spaces.plugins import plugin, plugins

__all__ = ["WINDOWS", "OptunaSampler", "Sampler", "check_sampler", "distributions", "known_samplers", "make_sampler"]

WINDOWS = "autoeff:windows"
"""System attribute of an Optuna trial that is to be evaluated on that many windows only."""

_TRIES = 100  # to turn a repeated proposal into a new one
_SMALL = 1 << 14  # configurations of a space that is looked through when all tries failed; in larger ones a repetition is let through


class Sampler(ABC):
    """Proposes configurations of one problem.

    Attributes:
        name: As in `--sampler`.
        pending: Proposals whose outcome is not known yet.
    """

    name: ClassVar[str]
    pending = 0

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def tell(self, indices: tuple[int, ...], windows: int, value: float | None, asked: bool) -> None:  # noqa: B027  (optional)
        """Hears of every evaluation on the search text in the order of trials, cheap fidelities and guests (not asked) included.

        A value of None is a failure.
        """

    @abstractmethod
    def for_ask(self, number: int) -> BaseSampler:
        """The Optuna sampler of ask `number`, seeded with H(job seed, number) alone, so that a resumed search asks the same.

        Raises:
            StopIteration: Everything within the limits is known, or the next proposal depends on a pending one.
        """


_WHERE = ("autoeff.search.samplers", Sampler, "autoeff.samplers")


def known_samplers() -> Mapping[str, type[Sampler]]:
    """Every sampler on this machine by name."""
    return plugins(*_WHERE)


def make_sampler(name: str, problem: Problem) -> Sampler:
    """The sampler `name`.

    Raises:
        InputError: There is none.
    """
    sampler: Sampler = plugin(*_WHERE, name)(problem)
    return sampler


def check_sampler(name: str) -> None:
    """Raises InputError if there is no sampler `name`; the message lists those that exist."""
    plugin(*_WHERE, name)


def distributions(problem: Problem) -> dict[str, BaseDistribution]:
    """One level index for each decision key; 0 is dense. Levels are ordered by cost, and words that cost nothing have no order."""
    return {
        decision.key: CategoricalDistribution(range(len(decision.levels)))
        if any(isinstance(level, str) for level in decision.levels) and not any(decision.alone)
        else IntDistribution(0, len(decision.levels) - 1)
        for decision in problem.space.decisions
    }


class OptunaSampler(Sampler):
    """A sampler of Optuna's, made anew for every ask and kept within the limits.

    Attributes:
        together: Whether it draws all decisions together where there are trials to learn from.
    """

    together: ClassVar[bool] = True

    @abstractmethod
    def make(self, seed: int) -> BaseSampler:
        """The sampler of one ask."""

    def for_ask(self, number: int) -> BaseSampler:
        seed = stream(self.problem.seed, self.name, number).getrandbits(32)
        return _Feasible(self.make(seed), self.problem, self._ledger, number, together=self.together)

    @cached_property
    def _ledger(self) -> Ledger:
        return Ledger(self.problem.space, self.problem.cost_model, self.problem.cost_limits)


class _Feasible(BaseSampler):
    """Repairs what another sampler proposes before Optuna records it: within the limits, and not proposed before.

    With one objective the repair also fills what the limits leave, since unused budget is lost quality.
    """

    def __init__(self, inner: BaseSampler, problem: Problem, ledger: Ledger, number: int, *, together: bool) -> None:
        self._inner, self._problem, self._ledger, self._together = inner, problem, ledger, together
        self._rng = stream(problem.seed, "repair", number)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions(self._problem)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        # Optuna would compare the distributions of all trials to learn which it may draw together: ours are always the same.
        together = self._together and any(other.state is TrialState.COMPLETE for other in trials)
        relative = {name: each for name, each in sorted(search_space.items()) if not each.single()} if together else {}
        params = self._inner.sample_relative(study, trial, relative)
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = self._inner.sample_independent(study, trial, name, distribution)
        known = [other.params for other in trials if other.number != trial.number]
        indices = [int(params[name]) for name in search_space]
        for _ in range(_TRIES):
            repaired = dict(zip(search_space, self._repaired(indices), strict=True))
            if repaired not in known:
                return repaired
            indices = list(repaired.values())
            place = self._rng.randrange(len(indices))
            indices[place] = self._rng.randrange(len(self._problem.space.decisions[place].levels))
        return self._new({tuple(params[name] for name in search_space) for params in known}, search_space) or repaired

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner.after_trial(study, trial, state, values)

    def _repaired(self, indices: Sequence[int]) -> tuple[int, ...]:
        if not self._problem.cost_limits:
            return self._problem.space.normalised(indices)
        rng: random.Random = self._rng
        repaired = self._ledger.repaired(indices, rng)
        return self._ledger.filled(repaired, rng) if len(self._problem.objectives) == 1 else repaired

    def _new(self, known: set[tuple[int, ...]], names: Iterable[str]) -> dict[str, Any] | None:
        """A random one of the configurations of a small space that are within the limits and new."""
        space = self._problem.space
        if prod(len(decision.levels) for decision in space.decisions) > _SMALL:
            return None
        every = itertools.product(*(range(len(decision.levels)) for decision in space.decisions))
        left = [x for x in every if x not in known and space.normalised(x) == x and self._ledger.feasible(x)]
        return dict(zip(names, self._rng.choice(left), strict=True)) if left else None
