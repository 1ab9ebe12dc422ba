"""Budgets as sliders: how far each cost can go, and the limits that a choice stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from autoeff.dashboard.fetch import Terrain
from autoeff.dashboard.words import unit_of
from autoeff.errors import InputError
from autoeff.search.limits import least_reachable, parse_limit
from autoeff.spaces.measurements import described

__all__ = ["Slider", "limits_of", "sliders_of"]

_ORDER = ("weight_bytes", "kv_bytes", "decode_ms", "prefill_ms", "avg_bits", "linear_bytes", "bytes_per_token", "flops_per_token")
_STEPS = 200


@dataclass(frozen=True)
class Slider:
    """One cost that can be limited.

    Attributes:
        least: Least value that the space reaches, in units of `unit`, rounded up to a step.
        most: That of the dense model: here the cost is not limited.
        start: Where the slider stands first.
        unit: What is written behind values.
        factor: From a value of the slider to one of the measurement.
    """

    name: str
    least: float
    most: float
    step: float
    start: float
    unit: str
    factor: float

    @property
    def digits(self) -> int:
        """Behind the point, so that a step can be seen."""
        return next((d for d in range(7) if abs(self.step * 10**d - round(self.step * 10**d)) < 1e-9), 6)


def sliders_of(ground: Terrain, limits: Sequence[str], quality: str) -> list[Slider]:
    """A slider for each cost that the space can change: those that the job limits first, standing where it limits them."""
    limited: dict[str, float] = {}
    for text in limits:
        try:
            limit = parse_limit(text, ground.costs, quality)
        except InputError:
            continue
        if limit.name in ground.costs.measures:
            limited[limit.name] = min(float(limit.bound), limited.get(limit.name, float("inf")))
    found = []
    for name in [*limited, *(name for name in _ORDER if name in ground.costs.measures and name not in limited)]:
        dense, least = float(ground.costs.dense(name)), float(least_reachable(ground.costs, name))
        if dense <= 0 or least >= dense:
            continue
        found.append(_slider(name, least, dense, limited.get(name)))
    return found


def limits_of(sliders: Sequence[Slider], values: Mapping[str, float]) -> list[str]:
    """The limits that the sliders stand for; one at its end limits nothing."""
    found = []
    for slider in sliders:
        value = values.get(slider.name, slider.most)
        if value < slider.most:
            bound = value * slider.factor
            found.append(
                f"{slider.name}<={bound:.0f}"
                if described(slider.name).unit.startswith(("bytes", "FLOP")) and bound >= 100
                else f"{slider.name}<={bound:.6g}"
            )
    return found


def _slider(name: str, least: float, dense: float, bound: float | None) -> Slider:
    unit, factor = unit_of(name, dense)
    step = _round_step((dense - least) / factor / _STEPS)
    low, high = ceil(least / factor / step) * step, ceil(dense / factor / step) * step
    start = high if bound is None else min(max(low, round(bound / factor / step) * step), high)
    return Slider(name, low, high, step, start, unit, factor)


def _round_step(step: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is no larger."""
    from math import floor, log10

    power = 10.0 ** floor(log10(step))
    return next(digit * power for digit in (5, 2, 1) if digit * power <= step * (1 + 1e-12))
