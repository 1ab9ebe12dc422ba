"""Limits on a search: parsed from text, kept as exact fractions, proved reachable before anything is evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm

from autoeff.errors import InputError, UnreachableLimit
from autoeff.search.allocators.dp import Allocator
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import MEASURES
from autoeff.spaces.space import Context

__all__ = ["Limit", "check_reachable", "cost_limits", "feasible", "least_reachable", "parse_limit"]

_FORM = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>|==|=)\s*((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*([A-Za-z]*)\s*")
_BYTES = {"B": 1} | {f"{letter}{mark}B": base ** (i + 1) for i, letter in enumerate("KMGT") for mark, base in (("", 1000), ("i", 1024))}
_TIMES = {"us": Fraction(1, 1000), "ms": Fraction(1), "s": Fraction(1000)}
_EXAMPLE = "write for example weight_bytes<=0.30x, linear_bytes<=900MB or avg_bits<=3.5"


@dataclass(frozen=True)
class Limit:
    """`name <= bound`, or `name >= bound`.

    Attributes:
        name: A cost measure, the quality measure of the job, or a metric of the user's own; costs alone are known before an evaluation.
        bound: Absolute, in the unit of the measure.
        text: As the user wrote it.
        lower: Whether values must be at least the bound; only metrics of the user's own have such limits.
    """

    name: str
    bound: Fraction
    text: str
    lower: bool = False

    def met(self, value: Fraction | float) -> bool:
        """Whether a value of the measure keeps the limit; NaN does not."""
        return value >= self.bound if self.lower else value <= self.bound

    def excess(self, value: float) -> float:
        """How far a value is beyond the bound, in the unit of the measure; 0 or less where the limit is kept."""
        beyond = value - float(self.bound)
        return -beyond if self.lower else beyond


def parse_limit(text: str, cost_model: CostModel, quality: str = "kl") -> Limit:
    """The limit that `text` states: `NAME<=VALUE` with a plain number, a byte unit, or `x` for "times dense".

    Args:
        text: For example `weight_bytes<=0.30x`, exact to the digit; MB is 10^6 and MiB 2^20 bytes.
        cost_model: Knows the cost measures and their dense values.
        quality: Name of the job's quality measure; the word `quality` stands for it.

    Raises:
        InputError: Another form, an unknown measure, a unit that does not fit, or a lower bound.
    """
    if (match := _FORM.fullmatch(text)) is None:
        raise InputError(f"cannot read the limit {text!r}; {_EXAMPLE}")
    name, relation, number, unit = match.groups()
    name = quality if name == "quality" else name
    if name not in cost_model.measures and name != quality:
        allowed = ", ".join([*cost_model.measures, quality])
        raise InputError(f"limit {text!r}: no limit can be set on {name!r}; allowed: {allowed}")
    if relation != "<=":
        raise InputError(f"limit {text!r}: every limit is an upper bound; write {name}<={number}{unit}")
    value = Fraction(number)
    if unit == "x":
        if name == quality:
            raise InputError(f"limit {text!r}: {name} of the dense model is 0, so it takes an absolute bound such as {name}<=0.1")
        return Limit(name, value * cost_model.dense(name), text.strip())
    if unit:
        units = _units(name)
        if not units:
            raise InputError(f"limit {text!r}: {name} is in {MEASURES[name].unit} and takes no {unit!r}; write a plain number or 0.30x")
        if unit not in units:
            raise InputError(f"limit {text!r}: unknown unit {unit!r}; allowed: {', '.join(units)} and x")
        value *= units[unit]
    return Limit(name, value, text.strip())


def cost_limits(limits: Sequence[Limit], cost_model: CostModel) -> tuple[Limit, ...]:
    """The limits that arithmetic can check before any forward pass."""
    return tuple(limit for limit in limits if limit.name in cost_model.measures)


def feasible(limits: Sequence[Limit], cost_model: CostModel, indices: Sequence[int]) -> bool:
    """Whether a configuration keeps every limit on a cost, exactly. Limits on quality are not looked at."""
    primary = cost_model.space.primary(indices)
    return all(limit.met(cost_model.measures[limit.name](primary)) for limit in cost_limits(limits, cost_model))


def least_reachable(cost_model: CostModel, name: str) -> Fraction:
    """The least value of a cost measure over the whole space, exact."""
    space, form = cost_model.space, cost_model.measures[name]
    unit = lcm(*(c.denominator for c in form.coefficients.values()))
    coefficients = {name: int(c * unit) for name, c in form.coefficients.items()}  # sums of integers take a tenth of the time

    def least(i: int, context: Context) -> int:
        decision = space.decisions[i]
        below: dict[int | None, int] = {None: 0}
        below |= {
            branch: sum(least(child, (*context, branch)) for child in space.children[i])
            for branch in set(decision.branches)
            if branch is not None
        }
        changes = (sum(c * cost.get(name, 0) for name, c in coefficients.items()) for cost in decision.costs[context])
        return min(change + below[branch] for change, branch in zip(changes, decision.branches, strict=True))

    return cost_model.dense(name) + Fraction(sum(least(i, ()) for i in space.roots), unit)


def check_reachable(limits: Sequence[Limit], cost_model: CostModel) -> None:
    """Refuses limits that no configuration of the space can keep, alone or together.

    Raises:
        UnreachableLimit: With the least reachable value of the limit that fails, in the form in which it was written.
    """
    limits = cost_limits(limits, cost_model)
    for limit in limits:
        least = least_reachable(cost_model, limit.name)
        if least > limit.bound:
            raise UnreachableLimit(
                f"limit {limit.text!r} cannot be reached: the least {limit.name} of this space is {_like(limit, least, cost_model)}; "
                "raise the limit or add levels or knobs"
            )
    *others, last = limits or (None,)
    if not others or last is None:
        return
    allocator = Allocator(cost_model.space, cost_model, others, last.name)
    found = allocator.front([[0.0] * len(d.levels) for d in cost_model.space.decisions], 1)  # nothing harms: the least of `last`
    if allocator.exact and (not found or not feasible(limits, cost_model, found[0])):
        rest = " and ".join(repr(limit.text) for limit in others if limit is not None)
        least_text = (
            f"the least {last.name} is {_like(last, cost_model.exact(last.name, found[0]), cost_model)}" if found else "nothing is left"
        )
        raise UnreachableLimit(f"limit {last.text!r} cannot be kept together with {rest}: under those {least_text}; raise one of them")


def _units(name: str) -> Mapping[str, int | Fraction]:
    """The units that a limit on a measure may be written in, by their size in the measure's own."""
    unit = MEASURES[name].unit
    return _BYTES if unit.startswith("bytes") else _TIMES if unit == "ms" else {}


def _like(limit: Limit, value: Fraction, cost_model: CostModel) -> str:
    """`value` in the form of the limit's own text, rounded up so that it can be used as a limit."""
    unit = limit.text[len(limit.text.rstrip("xBKMGTimus")) :]
    units = _units(limit.name)
    scale = cost_model.dense(limit.name) if unit == "x" else Fraction(units.get(unit, 1))
    digits = 0 if not unit and "B" in units else 4
    return f"{ceil(value / scale * 10**digits) / 10**digits:.{digits}f}{unit}"
