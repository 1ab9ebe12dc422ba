"""Gaussian-process Bayesian optimisation. An ask takes seconds beyond some hundred trials: for expensive models and small budgets."""

from __future__ import annotations

import warnings
from typing import ClassVar

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler

from autoeff.search.sampler import OptunaSampler

__all__ = ["GP"]


class GP(OptunaSampler):
    """Optuna's `GPSampler`, kept within the limits."""

    name: ClassVar[str] = "gp"

    def make(self, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # stable enough to be offered; the pin guards its behaviour
            return GPSampler(seed=seed)
