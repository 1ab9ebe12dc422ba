"""What is stored of a search of the user's own code, and the problem that follows from it. Reading it needs no function of the user's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

from autoeff.errors import InputError
from autoeff.search.limits import Limit
from autoeff.search.samplers.problem import OperatingPoint, Problem
from autoeff.search.storage.records import Job
from autoeff.spaces.configuration import Level
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import MEASURES
from autoeff.spaces.space import Decision, SearchSpace

__all__ = ["NUMBER", "Choice", "OwnJob", "OwnProblem", "choice", "is_own", "refuse_own"]

NUMBER = "trial"
"""Stands where a front has no second axis: the number of the trial."""

_KIND = "own"
_FORM = re.compile(r"\s*([A-Za-z_][\w./:@-]*)\s*(<=|>=|<|>|==|=)\s*([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*")


@dataclass(frozen=True)
class Choice:
    """Values of which a configuration has one; the first is that of the reference configuration."""

    values: tuple[Level, ...]

    def __post_init__(self) -> None:
        for value in self.values:
            if not isinstance(value, int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"choice has the value {value!r}; allowed: finite numbers, words, True and False")
        if len(self.values) < 2 or len(set(self.values)) < len(self.values):
            shown = ", ".join(map(repr, self.values))
            raise InputError(f"choice({shown}) must have two different values or more; what is fixed belongs into build")


def choice(*values: Level) -> Choice:
    """Values to choose among: numbers in an order that means something, or words, which have none.

    The first one is the reference: the configuration of all first values is evaluated in every search, as the baseline.

    Raises:
        InputError: Fewer than two values, a repeated one (1 and True are equal), or one that JSON does not know.
    """
    return Choice(values)


@dataclass(frozen=True)
class OwnProblem(Problem):
    """A search whose values are all measured: nothing is known before an evaluation, so every limit is judged after it."""

    @property
    def quality_limits(self) -> tuple[Limit, ...]:
        return ()

    @cached_property
    def cost_measure(self) -> str:
        """The other axis of the front: the second objective, else the first metric with a limit, else the number of the trial."""
        names = [*(name.removeprefix("-") for name in self.objectives), *(limit.name for limit in self.limits)]
        return next((name for name in names if name != self.quality), NUMBER)

    @cached_property
    def operating_points(self) -> tuple[OperatingPoint, ...]:
        return (OperatingPoint(", ".join(limit.text for limit in self.limits), self.limits),)


@dataclass(frozen=True)
class OwnJob:
    """A search of the user's own code but for its functions.

    Attributes:
        build: Name of the function that builds a candidate.
        levels: Name of each decision with its values, the reference first.
        metrics: Names of the functions that measure a candidate.
        objectives: Names of metrics to minimise; `-name` maximises.
        limits: Such as `parameters<=1e6` or `accuracy>=0.9`.
        trials: Budget in evaluations.
        seconds: Budget of wall time.
        seed: Of everything random.
        sampler: Who proposes.
    """

    build: str
    levels: tuple[tuple[str, tuple[Level, ...]], ...]
    metrics: tuple[str, ...]
    objectives: tuple[str, ...]
    limits: tuple[str, ...]
    trials: int
    seconds: float | None
    seed: int
    sampler: str

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError('space is empty; write for example space={"depth": autoeff.choice(2, 4, 6)}')
        if not self.objectives:
            raise InputError('objectives are empty; write for example objectives=["-accuracy", "parameters"]')
        names = [name.removeprefix("-") for name in self.objectives]
        if len(set(names)) < len(names):
            raise InputError(f"objectives name {', '.join(self.objectives)}: each may stand once")
        for name in [*names, *self.metrics, *(limit.name for limit in self.parsed_limits)]:
            if name in MEASURES:
                raise InputError(f"{name!r} is the name of a built-in measurement ({MEASURES[name].meaning}); give your metric another")
        if self.trials < 1:
            raise InputError(f"trials is {self.trials}; at least 1 is needed")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"timeout is {self.seconds}; seconds above 0 are needed")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; allowed: 0 to {2**32 - 1}")
        if self.sampler == "additive":
            raise InputError("sampler additive needs costs that are known before an evaluation, which own code has not; use tpe or nsga2")

    @cached_property
    def parsed_limits(self) -> tuple[Limit, ...]:
        return tuple(map(_limit, self.limits))

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """Names that every candidate must be measured under."""
        names = [*(name.removeprefix("-") for name in self.objectives), *(limit.name for limit in self.parsed_limits)]
        return tuple(dict.fromkeys(names))

    @cached_property
    def problem(self) -> OwnProblem:
        """What the samplers are told: a space whose levels cost nothing that is known."""
        decisions = tuple(Decision(name, "", 0, levels, {(): ({},) * len(levels)}, uniform=False) for name, levels in self.levels)
        space = SearchSpace(decisions, {})
        return OwnProblem(space, _Unknown(space), self.parsed_limits, self.objectives, self.trials, 1, self.seed)

    def to_json(self) -> dict[str, Any]:
        """The form in which it is stored; `model` stands for the code in lists of jobs."""
        return {
            "format": 1, "kind": _KIND, "model": self.build, "space": [[name, list(levels)] for name, levels in self.levels],
            "metrics": list(self.metrics), "objectives": list(self.objectives), "limits": list(self.limits),
            "budget": {"trials": self.trials, "seconds": self.seconds}, "seed": self.seed, "sampler": self.sampler,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OwnJob:
        """The job that `to_json` wrote.

        Raises:
            InputError: Another format number.
        """
        if value["format"] != 1:
            raise InputError(f"a search of own code of format {value['format']!r}; this version reads 1")
        levels = tuple((name, tuple(levels)) for name, levels in value["space"])
        return cls(
            build=value["model"],
            levels=levels,
            metrics=tuple(value["metrics"]),
            objectives=tuple(value["objectives"]),
            limits=tuple(value["limits"]),
            trials=value["budget"]["trials"],
            seconds=value["budget"]["seconds"],
            seed=value["seed"],
            sampler=value["sampler"],
        )

    def check_same(self, stored: OwnJob, run: object) -> None:
        """Refuses to go on with a run of another search; the functions themselves cannot be compared, and wall time may differ.

        Raises:
            InputError: Something else than the wall time differs; the message says what.
        """
        for field in fields(self):
            before, now = getattr(stored, field.name), getattr(self, field.name)
            if before != now and field.name != "seconds":
                name = {"levels": "space"}.get(field.name, field.name)
                raise InputError(f"run {run} cannot go on: {name} changed from {_shown(before)} to {_shown(now)}; name another out")


class _Unknown(CostModel):
    """The costs of a space of which none are known."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.measures = {}


def is_own(job: Job) -> bool:
    """Whether a stored job searched the user's own code."""
    return job.spec.get("kind") == _KIND


def refuse_own(job: Job, why: str) -> None:
    """Refuses what only a search of a model can do.

    Raises:
        InputError: The job searched the user's own code.
    """
    if is_own(job):
        raise InputError(f"job {job.id} searched code of its own ({job.spec['model']}), {why}")


def _limit(text: str) -> Limit:
    if not isinstance(text, str) or (match := _FORM.fullmatch(text)) is None:
        raise InputError(f"cannot read the limit {text!r}; write for example parameters<=1e6 or accuracy>=0.9")
    name, relation, number = match.groups()
    if relation not in ("<=", ">="):
        raise InputError(f"limit {text!r}: write {name}<={number} or {name}>={number}")
    return Limit(name, Fraction(number), text.strip(), lower=relation == ">=")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "…"
