"""Gaussian-process Bayesian optimisation. An ask takes seconds beyond some hundred trials: for expensive models and small budgets."""

from __future__ import annotations

import warnings
from typing import ClassVar

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler

from autoeff.search.sampler import Feasible, Sampler
from autoeff.search.samplers.problem import stream

__all__ = ["GP"]


class GP(Sampler):
    """Optuna's `GPSampler`, kept within the limits."""

    name: ClassVar[str] = "gp"

    def for_ask(self, number: int) -> BaseSampler:
        seed = stream(self.problem.seed, self.name, number).getrandbits(32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # stable enough to be offered; the pin guards its behaviour
            inner = GPSampler(seed=seed)
        return Feasible(inner, self.problem, number)
