"""Minimises a quadratic form of damage within limits: additive optima of its linearisation, then the best pairs of moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoeff.search.allocators.dp import Allocator
from autoeff.search.samplers.damage_model import DamageModel, Form
from autoeff.search.samplers.ledger import Ledger

__all__ = ["minimised"]

Integers = NDArray[np.intp]

_LINEARISATIONS = 4
_STEPS = 64
_FEATURES = 512  # a matrix of all pairs of moves takes some 10 ms
_GAIN = 1e-9  # relative; smaller predicted gains are rounding


def minimised(form: Form, model: DamageModel, allocator: Allocator, ledger: Ledger, start: Sequence[int], radius: int) -> tuple[int, ...]:
    """A configuration within the limits that the form predicts to be no worse than `start`; normalised.

    Args:
        form: Predicted damage.
        model: Names the features of the form.
        allocator: Solves additive tables within the limits.
        ledger: Costs within the same limits.
        start: Level indices within the limits.
        radius: Every active decision stays within so many levels of `start`.
    """
    space = model.space
    best = space.normalised(start)
    active = space.active(best)
    near = [
        [level for level in range(len(d.levels)) if not on or abs(level - at) <= radius]
        for d, at, on in zip(space.decisions, best, active, strict=True)
    ]
    value = form.value(model.features(best))
    for _ in range(_LINEARISATIONS):
        found = allocator.solve(model.table(form.gains(model.features(best))), near)
        if found is None or (predicted := form.value(model.features(found))) >= value - _GAIN * abs(value):
            break
        best, value = found, predicted
    return _descended(form, model, ledger, best, near)


def _descended(form: Form, model: DamageModel, ledger: Ledger, start: Sequence[int], near: list[list[int]]) -> tuple[int, ...]:
    """Steepest descent over single moves and pairs of moves. Parents stay: their moves take children along, which the DP does."""
    space = model.space
    free = [on and not children for on, children in zip(space.active(start), space.children, strict=True)]
    found = np.array(start)
    allowed = np.array(
        [first + level for first, levels, on in zip(model.first, near, free, strict=True) if on for level in levels], np.intp
    )
    every = ledger.costs(start)
    features = _promising(allowed[~model.forbidden[allowed]], form, model, every, found)
    decision, level = model.decision[features], model.level[features]
    pairs, costs, slack = form.pairs(features), every[:, decision, level], ledger.slack(start)
    apart = decision[:, None] != decision
    for _ in range(_STEPS if features.size else 0):
        gains = form.gains(model.features(found.tolist()))[features]
        now = _in_force(decision, level, found)
        single, cost = gains - gains[now], costs - costs[:, now]
        double = single[:, None] + single + pairs - pairs[:, now] - pairs[now] + pairs[np.ix_(now, now)]
        double[~(apart & (cost[:, :, None] + cost[:, None, :] <= slack[:, None, None]).all(0))] = np.inf
        single[~(cost <= slack[:, None]).all(0)] = np.inf
        pair = np.unravel_index(double.argmin(), double.shape)
        moves = [single.argmin()] if single.min() <= double[pair] else list(pair)
        if min(single.min(), double[pair]) >= -_GAIN * np.abs(gains).max():
            break
        for k in moves:
            slack = slack - cost[:, k]
            found[decision[k]] = level[k]
    return tuple(found.tolist())


def _in_force(decision: Integers, level: Integers, found: Integers) -> Integers:
    """For each feature the place of the one of its decision that is in force."""
    place = np.zeros(len(found), np.intp)
    held = level == found[decision]
    place[decision[held]] = np.flatnonzero(held)
    return place[decision]


def _promising(features: Integers, form: Form, model: DamageModel, costs: NDArray[np.int64], found: Integers) -> Integers:
    """The features whose moves save most damage per cost, or cost per damage, with those in force beside them."""
    if len(features) <= _FEATURES or not len(costs):
        return features
    decision, level = model.decision[features], model.level[features]
    gains = form.gains(model.features(found.tolist()))[features]
    cost = costs[0, decision, level].astype(float)
    now = _in_force(decision, level, found)
    gain, cost = gains - gains[now], cost - cost[now]
    rate = np.where(cost == 0, np.inf, gain / np.abs(np.where(cost == 0, 1, cost)))
    kept = [np.argsort(np.where(side, rate, np.inf), kind="stable")[: _FEATURES // 4] for side in (cost > 0, cost < 0)]
    chosen = np.concatenate(kept)
    with_rivals: Integers = features[np.unique(np.concatenate([chosen, now[chosen]]))]
    return with_rivals
