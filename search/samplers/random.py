"""Random configurations within the limits."""

from __future__ import annotations

from typing import ClassVar

from optuna.samplers import BaseSampler, RandomSampler

from autoeff.search.sampler import Feasible, Sampler
from autoeff.search.samplers.problem import stream

__all__ = ["Random"]


class Random(Sampler):
    """Optuna's `RandomSampler`, kept within the limits."""

    name: ClassVar[str] = "random"

    def for_ask(self, number: int) -> BaseSampler:
        seed = stream(self.problem.seed, self.name, number).getrandbits(32)
        return Feasible(RandomSampler(seed=seed), self.problem, number)
