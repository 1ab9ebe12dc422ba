"""Random configurations within the limits."""

from __future__ import annotations

from typing import ClassVar

from optuna.samplers import BaseSampler, RandomSampler

from autoeff.search.sampler import OptunaSampler

__all__ = ["Random"]


class Random(OptunaSampler):
    """Optuna's `RandomSampler`, kept within the limits."""

    name: ClassVar[str] = "random"
    together: ClassVar[bool] = False

    def make(self, seed: int) -> BaseSampler:
        return RandomSampler(seed=seed)
