"""What a sampler may know: the space, exact costs, limits and budget. And what it says: candidates."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import inf
from typing import Literal

from autoeff.search.limits import Limit, cost_limits, feasible, least_reachable
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import SearchSpace

__all__ = ["Candidate", "OperatingPoint", "Origin", "Problem", "stream"]

Origin = Literal["dense", "uniform", "random", "table", "additive", "seed", "searched", "given", "alternative"]


@dataclass(frozen=True)
class Candidate:
    """A configuration to be evaluated.

    Attributes:
        indices: Level indices, normalised.
        windows: Of the search text; fewer than all of them is a cheap fidelity.
        origin: Who proposes it. Only `dense`, `uniform` and `table` may break a limit.
        label: For people, such as `bits=3`.
    """

    indices: tuple[int, ...]
    windows: int
    origin: Origin
    label: str | None = None


@dataclass(frozen=True)
class OperatingPoint:
    """A budget at which the search looks for the best configuration.

    Attributes:
        name: The limits as the user wrote them, or the uniform level whose cost it has.
        limits: On costs.
    """

    name: str
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class Problem:
    """One search.

    Attributes:
        space: The decisions.
        cost_model: Their exact costs.
        limits: Hard limits.
        objectives: What is minimised; first the quality measure, then cost measures. `-name` minimises minus `name`.
        trials: Budget in full-token equivalents, everything counted.
        windows: Windows of the search text at full fidelity.
        seed: Of everything random.
        max_degradation: Largest share of the dense model's accuracy that a configuration may lose on any task, to be found; tasks are
            asked of finalists alone.
    """

    space: SearchSpace
    cost_model: CostModel
    limits: tuple[Limit, ...]
    objectives: tuple[str, ...]
    trials: int
    windows: int
    seed: int
    max_degradation: float | None = None

    @property
    def quality(self) -> str:
        """Name of the measurement of the first objective."""
        return self.objectives[0].removeprefix("-")

    @property
    def few_windows(self) -> int:
        """The cheap fidelity: a quarter of the windows."""
        return max(1, self.windows // 4)

    @cached_property
    def cost_limits(self) -> tuple[Limit, ...]:
        return cost_limits(self.limits, self.cost_model)

    @property
    def quality_limits(self) -> tuple[Limit, ...]:
        """The limits on measured values that hold at every operating point."""
        return tuple(limit for limit in self.limits if limit.name not in self.cost_model.measures)

    @cached_property
    def cost_measure(self) -> str:
        """The cost that a front is drawn over: the first objective on a cost, else the first limited one, else the stored bytes."""
        names = [*self.objectives[1:], *(limit.name for limit in self.cost_limits), "weight_bytes"]
        return names[0]

    @cached_property
    def operating_points(self) -> tuple[OperatingPoint, ...]:
        """The limits; where there are none, the cost of each uniform level; where there is none either, three steps down the range."""
        if self.cost_limits:
            return (OperatingPoint(", ".join(limit.text for limit in self.cost_limits), self.cost_limits),)
        points: dict[Fraction, OperatingPoint] = {}
        for name, configuration in self.space.uniform.items():
            bound = self.cost_model.exact(self.cost_measure, self.space.indices(configuration.levels))
            points.setdefault(bound, OperatingPoint(name, (Limit(self.cost_measure, bound, f"{self.cost_measure}<={name}"),)))
        if not points:
            dense, least = self.cost_model.dense(self.cost_measure), least_reachable(self.cost_model, self.cost_measure)
            for quarter in (3, 2, 1):
                bound = least + (dense - least) * quarter / 4
                text = f"{self.cost_measure}<={float(bound):g}"
                points.setdefault(bound, OperatingPoint(text, (Limit(self.cost_measure, bound, text),)))
        return tuple(points.values())

    def feasible(self, indices: Sequence[int]) -> bool:
        """Whether every limit on a cost is kept."""
        return feasible(self.limits, self.cost_model, indices)

    def values(self, indices: Sequence[int], measured: Callable[[str], float | None]) -> list[float] | None:
        """The objective values, all minimised; None where one was not measured.

        Args:
            indices: Level indices, from which costs follow.
            measured: The measured value of a name, such as `Trial.value`.
        """
        found = []
        for objective in self.objectives:
            name = objective.removeprefix("-")
            value = float(self.cost_model.exact(name, indices)) if name in self.cost_model.measures else measured(name)
            if value is None:
                return None
            found.append(value if name == objective else -value)
        return found

    def constraints(self, measured: Callable[[str], float | None]) -> dict[str, float]:
        """By the text of each limit on a measured value by how much it is exceeded; 0 or less where it is kept."""
        found = {}
        for limit in self.limits:
            if limit.name not in self.cost_model.measures:
                value = measured(limit.name)
                found[limit.text] = inf if value is None else limit.excess(value)
        return found

    def violation(self, measured: Callable[[str], float | None]) -> float:
        """How far a candidate is beyond the limits on measured values, each relative to its bound; 0 where all are kept."""
        scales = {limit.text: abs(float(limit.bound)) or 1.0 for limit in self.limits}
        return sum(max(0.0, excess) / scales[text] for text, excess in self.constraints(measured).items())


def stream(seed: int, *names: object) -> random.Random:
    """A generator of its own for everything that has a name: the same on every machine and Python."""
    text = "/".join(map(str, (seed, *names)))
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))
