"""What a seed is: a published rule that turns statistics and a budget into a configuration, evaluated beside the other guests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from autoeff.errors import InputError
from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.search.limits import Limit
from autoeff.search.samplers.problem import Problem
from autoeff.spaces.plugins import plugin, plugins
from autoeff.spaces.space import SearchSpace

__all__ = ["Formula", "Given", "Seed", "Steps", "known_seeds", "make_seeds"]

Steps = Generator[list[tuple[int, ...]], Sequence[float], "tuple[int, ...] | None"]
"""Yields configurations, is sent the quality that each loses on few windows, and returns one."""


@dataclass(frozen=True)
class Given:
    """What a rule may go by.

    Attributes:
        problem: The space, its costs and limits.
        limits: Of the operating point, on costs.
        damage: For each decision and level the quality lost by it alone.
        context: Tokens that budgets of the cache are shares of.
        least: Tokens of which every layer must keep so many.
        window: Of which so many are the last ones.
        statistics: Of the dense model, as far as a rule `needs` them.
    """

    problem: Problem
    limits: tuple[Limit, ...]
    damage: Sequence[Sequence[float]]
    context: int = 0
    least: int = 1
    window: int = 0
    statistics: ModelStatistics = field(default_factory=ModelStatistics)


class Seed(ABC):
    """A rule that may have configurations measured on its way; `Formula` is one that need not.

    Attributes:
        name: As in `--seeds`.
        knob: What it decides about; None if about every knob.
        needs: Names of the statistics that it goes by, see `ModelStatistics`.
        joins: Whether it joins every search that has its knob; else it must be asked for by name.
    """

    name: ClassVar[str]
    knob: ClassVar[str | None]
    needs: ClassVar[frozenset[str]] = frozenset()
    joins: ClassVar[bool] = True

    @abstractmethod
    def steps(self, given: Given) -> Steps:
        """Yields what it wants to have measured, and returns normalised level indices within the limits. Deterministic.

        It is sent infinity where a measurement failed or the budget has no room for it, and returns None where it has nothing to say.
        """

    @abstractmethod
    def measures(self, space: SearchSpace) -> int:
        """Configurations that `steps` has measured at the most."""


class Formula(Seed):
    """A rule that goes by the damage table and statistics alone."""

    @abstractmethod
    def configuration(self, given: Given) -> tuple[int, ...] | None:
        """Normalised level indices within the limits; None where it has nothing to say. Deterministic."""

    def steps(self, given: Given) -> Steps:
        yield from ()
        return self.configuration(given)

    def measures(self, space: SearchSpace) -> int:
        return 0


_WHERE = ("autoeff.search.allocators", Seed, "autoeff.allocators")


def known_seeds() -> Mapping[str, type[Seed]]:
    """Every rule on this machine by name."""
    return plugins(*_WHERE)


def make_seeds(names: Sequence[str] | None, knobs: Sequence[str]) -> list[Seed]:
    """The rules called so, or with None all that join searches of one of the `knobs`, by name.

    Raises:
        InputError: An unknown rule, or one whose knob is not searched.
    """
    if names is None:
        return [seed() for _, seed in sorted(known_seeds().items()) if seed.joins and seed.knob in knobs]
    found: list[Seed] = [plugin(*_WHERE, name)() for name in names]
    for seed in found:
        if seed.knob is not None and seed.knob not in knobs:
            raise InputError(f"seed {seed.name} shares out {seed.knob}, which is not among the knobs {', '.join(knobs)}")
    return found
