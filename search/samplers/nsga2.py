"""NSGA-II (Deb et al. 2002), as Optuna ships it: population 50, crossover and mutation over level indices."""

from __future__ import annotations

from typing import ClassVar

from optuna.samplers import BaseSampler, NSGAIISampler

from autoeff.search.sampler import Feasible, Sampler
from autoeff.search.samplers.problem import stream

__all__ = ["NSGA2"]


class NSGA2(Sampler):
    """Optuna's `NSGAIISampler`, kept within the limits."""

    name: ClassVar[str] = "nsga2"

    def for_ask(self, number: int) -> BaseSampler:
        seed = stream(self.problem.seed, self.name, number).getrandbits(32)
        return Feasible(NSGAIISampler(seed=seed), self.problem, number)
