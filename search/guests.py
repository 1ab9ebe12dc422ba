"""What every search evaluates before its sampler is asked: dense, uniform levels, the damage table, the additive optimum, random.

They are the baselines that a found configuration must beat, and what every sampler may start from (design: law 4).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from typing import Literal

from autoeff.search.allocators.dp import Allocator
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.problem import Candidate, Problem, stream
from autoeff.spaces.space import Decision, SearchSpace

__all__ = ["DamageTable", "TableForm", "finalists", "minimum_trials", "preamble", "random_candidates", "table_form"]

TableForm = Literal["full", "quarter", "cheap"]
"""Every level at all windows; every level at a quarter of them; two levels per decision at a quarter of them."""

_AFTER_TABLE = 5
"""Evaluations that a budget must leave after dense, uniform levels and the cheap table."""
_LEAST_DAMAGE = 1e-12

Values = Sequence[float | None]
Batch = list[Candidate]


@dataclass(frozen=True)
class DamageTable:
    """The quality that each level loses alone.

    Attributes:
        form: How it was measured.
        damage: For each decision and level, 0 for dense; infinity where the level alone fails.
    """

    form: TableForm
    damage: tuple[tuple[float, ...], ...]


def table_form(space: SearchSpace, trials: int, windows: int) -> TableForm:
    """The richest form of the damage table that takes at most a third of the budget; the cheap one if none does."""
    for form in ("full", "quarter"):
        if 3 * _table_cost(space, form, windows) <= trials:
            return form
    return "cheap"


def minimum_trials(space: SearchSpace, windows: int) -> int:
    """The least budget, in full-token equivalents: dense, uniform levels, the cheap table and five more."""
    return 1 + len(space.uniform()) + int(-(-_table_cost(space, "cheap", windows) // 1)) + _AFTER_TABLE
