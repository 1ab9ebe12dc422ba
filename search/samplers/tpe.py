"""Multivariate tree-structured Parzen estimator (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022)."""

from __future__ import annotations

import warnings
from typing import ClassVar

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler

from autoeff.search.sampler import OptunaSampler

__all__ = ["TPE"]


class TPE(OptunaSampler):
    """Optuna's `TPESampler`, kept within the limits."""

    name: ClassVar[str] = "tpe"

    def make(self, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # stable enough to be offered; the pin guards its behaviour
            return TPESampler(seed=seed, multivariate=True)
