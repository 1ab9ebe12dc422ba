"""What rules for the cache have in common: tokens shared out among the layers, and the levels that come nearest to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import ClassVar

from autoeff.evaluators.model_statistics import AttentionStatistics
from autoeff.search.allocators.dp import Allocator
from autoeff.search.allocators.nearest import nearest
from autoeff.search.seed import Formula, Given

__all__ = ["CacheSeed", "Tokens", "exact_shares"]

_HALVINGS = 200


@dataclass(frozen=True)
class Tokens:
    """What is to be shared out.

    Attributes:
        layers: How many.
        total: Tokens in all.
        least: Tokens that every layer keeps.
        most: Tokens that a layer can keep.
        window: Last tokens, which no rule takes from a layer.
        attention: By layer; empty where the rule needs none.
    """

    layers: int
    total: int
    least: int
    most: int
    window: int
    attention: tuple[AttentionStatistics, ...] = ()

    @property
    def mean(self) -> float:
        return self.total / self.layers


class CacheSeed(Formula):
    """A rule that says how many tokens each layer keeps.

    Everything else is as in the additive optimum, and so is the cache's share of the budget: the rule distributes it. Levels are
    those nearest to what the rule wants, see `nearest`.
    """

    knob: ClassVar[str] = "kv_budget"

    @abstractmethod
    def wanted(self, tokens: Tokens) -> list[float]:
        """Tokens of each layer; `shares` makes them whole, within bounds and exact in total."""

    def shares(self, tokens: Tokens) -> list[int]:
        """Whole tokens of each layer that add up to the total exactly."""
        return exact_shares(self.wanted(tokens), tokens.total, tokens.least, tokens.most)

    def configuration(self, given: Given) -> tuple[int, ...] | None:
        space = given.problem.space
        base = Allocator(space, given.problem.cost_model, given.limits).solve(given.damage)
        if base is None:
            return None
        active = space.active(base)
        layers = [i for i, decision in enumerate(space.decisions) if decision.knob == self.knob and active[i]]
        tokens = self._tokens(given, base, layers)
        if tokens is None:
            return None
        kept = {i: [float(self._kept(level, given.context)) for level in space.decisions[i].levels] for i in layers}
        return nearest(given, base, dict(zip(layers, map(float, self.shares(tokens)), strict=True)), kept)

    def _tokens(self, given: Given, base: Sequence[int], layers: Sequence[int]) -> Tokens | None:
        """The tokens that the limits leave to the layers where everything else is as in `base`; None if they need not share."""
        space = given.problem.space
        whole = [0 if i in layers else level for i, level in enumerate(base)]
        contexts, primary = space.contexts(whole), space.primary(whole)
        over = Fraction(0)
        for limit in given.limits:
            form = given.problem.cost_model.measures[limit.name]
            if coefficient := form.coefficients.get("cache_bytes"):
                over = max(over, (form(primary) - limit.bound) / coefficient)
        if over <= 0 or not layers:
            return None
        bytes_of: list[Fraction] = []  # of a token, by layer
        for i in layers:
            context = contexts[i]
            assert context is not None
            last = space.decisions[i].costs[context][-1]["cache_bytes"]
            bytes_of.append(Fraction(-last, given.context - self._kept(space.decisions[i].levels[-1], given.context)))
        total = floor(len(layers) * (given.context - over / sum(bytes_of)))
        if total < given.least * len(layers):
            return None
        attention = tuple(given.statistics.attention[space.decisions[i].site] for i in layers) if self.needs else ()
        return Tokens(len(layers), total, given.least, given.context, given.window, attention)

    @staticmethod
    def _kept(level: object, context: int) -> int:
        return int(float(level) * context + 1e-9)  # type: ignore[arg-type]


def exact_shares(wanted: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """Whole numbers between `least` and `most` that add up to `total`: the wanted ones, moved by the same amount where they may move.

    Args:
        wanted: Real numbers.
        total: At least `least`, at most `most`, times their count.
        least: Of each.
        most: Of each.
    """

    def moved(by: float) -> list[float]:
        return [min(max(w + by, least), most) for w in wanted]

    low, high = least - max(wanted), most - min(wanted)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(moved(middle)) < total else (low, middle)
    real = moved(high)
    whole = [floor(r + 1e-9) for r in real]
    order = sorted(range(len(real)), key=lambda i: (whole[i] - real[i], i))  # the largest remainders first
    for i in [*order, *order]:
        if sum(whole) < total and whole[i] < most:
            whole[i] += 1
    return whole
