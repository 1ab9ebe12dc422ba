"""NSGA-II (Deb et al. 2002), as Optuna ships it: population 50, crossover and mutation over level indices."""

from __future__ import annotations

from typing import ClassVar

from optuna.samplers import BaseSampler, NSGAIISampler

from autoeff.search.sampler import OptunaSampler

__all__ = ["NSGA2"]


class NSGA2(OptunaSampler):
    """Optuna's `NSGAIISampler`, kept within the limits."""

    name: ClassVar[str] = "nsga2"

    def make(self, seed: int) -> BaseSampler:
        return NSGAIISampler(seed=seed)
