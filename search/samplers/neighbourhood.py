"""Proposals at one budget: where the damage model, or a function as likely, expects the best configuration near those known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from autoeff.search.allocators.dp import Allocator
from autoeff.search.limits import Limit
from autoeff.search.samplers.damage_model import DamageModel, Form, Posterior
from autoeff.search.samplers.descent import minimised
from autoeff.search.samplers.evidence import Evidence, Indices
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.problem import Problem
from autoeff.spaces.space import SearchSpace

__all__ = ["Neighbourhood"]

_WORK = 2**24  # of a budget grid; solved several times per proposal
_STARTS = 3  # best configurations to descend from
_RADII = (1, 2)  # levels that a decision may move in one descent
_SCALE, _GROWTH, _WIDEST = 0.5, 1.3, 8.0  # of the deviation of random functions; grows while they propose nothing new
_TRIES = 40  # descents and as many random moves per proposal, before the space around counts as exhausted


class Neighbourhood:
    """The configurations within some limits.

    Args:
        problem: Where they are.
        model: Prior of damage.
        limits: On costs.
    """

    def __init__(self, problem: Problem, model: DamageModel, limits: Sequence[Limit]) -> None:
        self._model = model
        self._allocator = Allocator(problem.space, problem.cost_model, limits, work=_WORK)
        self._ledger = Ledger(problem.space, problem.cost_model, limits)
        self._everywhere = Ledger(problem.space, problem.cost_model, problem.cost_limits)
        self._within: dict[Indices, bool] = {}

    def feasible(self, indices: Indices) -> bool:
        if indices not in self._within:
            self._within[indices] = self._ledger.feasible(indices)
        return self._within[indices]

    def settled(self, evidence: Evidence) -> bool:
        """Whether nothing is left to improve: the best does no damage, or the limits leave a single configuration."""
        least = self._allocator.solve(self._model.table(self._model.alone))
        best = self.best(evidence)
        lowest = least is not None and not any(self._ledger.feasible(x) for x in _one_level_off(self._model.space, least))
        return lowest or (best is not None and evidence.full[best] <= 0)

    def best(self, evidence: Evidence) -> Indices | None:
        """The best configuration known within the limits."""
        return next(iter(evidence.ranked(self.feasible)), None)

    def proposals(self, evidence: Evidence, rng: random.Random, count: int) -> list[Indices]:
        """New configurations, the most promising first.

        Where the limits leave no more, others within those of the problem; fewer than `count` only where there are none either.
        """
        ranked = evidence.ranked(self.feasible)
        found: list[Indices] = []

        def is_new(x: Indices) -> bool:
            return x not in evidence.full and x not in evidence.few and x not in found

        posterior = self._posterior(evidence, ranked[0]) if ranked and evidence.full[ranked[0]] > 0 else None
        scale, draws = _SCALE, np.random.default_rng(rng.getrandbits(64))
        for descent in range(_TRIES + count if posterior else 0):
            if len(found) == count or posterior is None:
                break
            form = posterior.mean() if descent == 0 else posterior.draw(draws, scale)
            start = ranked[descent % min(_STARTS, len(ranked))]
            proposed = minimised(form, self._model, self._allocator, self._ledger, start, _RADII[descent % len(_RADII)])
            if is_new(proposed):
                found.append(proposed)
            else:
                scale = min(scale * _GROWTH, _WIDEST)
        centre = ranked[0] if ranked else self._allocator.solve(self._model.table(self._model.alone))
        while len(found) < count and (other := self._moved(centre, rng, is_new) or self._anywhere(rng, is_new)) is not None:
            found.append(other)
        return found

    def promising(self, evidence: Evidence, candidates: Sequence[Indices], count: int) -> list[Indices]:
        """Those of the screened candidates that are expected to be best on all windows."""
        best = self.best(evidence)
        screened = [x for x in candidates if x in evidence.few and x not in evidence.full]
        if best is None or evidence.full[best] <= 0:
            return sorted(screened, key=lambda x: (evidence.few[x], x))[:count]
        form: Form = self._posterior(evidence, best).mean()
        return sorted(screened, key=lambda x: (form.value(self._model.features(x)), x))[:count]

    def _posterior(self, evidence: Evidence, best: Indices) -> Posterior:
        observations = evidence.observations(best)
        return self._model.posterior(
            [o.indices for o in observations], [o.value for o in observations], evidence.full[best], [o.deviation for o in observations]
        )

    def _moved(self, centre: Indices | None, rng: random.Random, is_new: Callable[[Indices], bool]) -> Indices | None:
        """`centre` with some decisions raised, and others lowered to keep the limits: EvoPress' mutation (arXiv:2410.14649)."""
        if centre is None or is_new(centre):
            return centre
        for trial in range(_TRIES):
            moved = list(centre)
            for _ in range(min(rng.randint(1, 3), rng.randint(1, 3)) + trial // 4):
                i = rng.randrange(len(moved))
                moved[i] = max(0, moved[i] - 1)
            proposed = self._ledger.filled(self._ledger.repaired(moved, rng), rng)
            if is_new(proposed):
                return proposed
        return None

    def _anywhere(self, rng: random.Random, is_new: Callable[[Indices], bool]) -> Indices | None:
        drawn = (self._everywhere.repaired(self._model.space.sample(rng), rng) for _ in range(_TRIES))
        return next((x for x in drawn if is_new(x)), None)


def _one_level_off(space: SearchSpace, indices: Indices) -> Iterator[Indices]:
    for i, (level, decision) in enumerate(zip(indices, space.decisions, strict=True)):
        for other in (level - 1, level + 1):
            if 0 <= other < len(decision.levels):
                changed = space.normalised([*indices[:i], other, *indices[i + 1 :]])
                if changed != indices:
                    yield changed
