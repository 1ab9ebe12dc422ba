"""Multivariate tree-structured Parzen estimator (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022)."""

from __future__ import annotations

import warnings
from typing import ClassVar

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler

from autoeff.search.sampler import Feasible, Sampler
from autoeff.search.samplers.problem import stream

__all__ = ["TPE"]


class TPE(Sampler):
    """Optuna's `TPESampler`, kept within the limits."""

    name: ClassVar[str] = "tpe"

    def for_ask(self, number: int) -> BaseSampler:
        seed = stream(self.problem.seed, self.name, number).getrandbits(32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # stable enough to be offered; the pin guards its behaviour
            inner = TPESampler(seed=seed, multivariate=True)
        return Feasible(inner, self.problem, number)
