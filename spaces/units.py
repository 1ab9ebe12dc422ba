"""Knobs that cut units out of a sublayer: FFN neurons, KV heads with their query heads. What a unit is, data dependence says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.criterion import ScoreCriterion, known_criteria, make_criterion
from autoeff.spaces.knob import Cost, Kind, Knob
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Coupling, Site, Structure

__all__ = ["UnitKnob", "unit_scores"]

_DENSE = 1


@dataclass(frozen=True)
class UnitKnob(Knob):
    """Base of knobs whose levels are the share of a sublayer's units that is kept: those of greatest score.

    The linears become smaller matrices, which any kernel serves. The score of a unit is the sum over its rows and columns of the
    criterion's scores. Biases of removed rows are not counted as saved.

    Attributes:
        sublayer: Kind of the sites.
        criterion: Name of a criterion that scores weights, see `autoeff.spaces.criteria`.
        shares: Levels below 1.
        multiple: Units are kept in multiples of it, rounded up.
    """

    kind: ClassVar[Kind] = "structure"
    coupled: ClassVar[bool] = True
    sublayer: ClassVar[Literal["attention", "ffn"]]

    criterion: str = "wanda"
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    multiple: int = 1

    def __post_init__(self) -> None:
        _ = self._criterion  # a wrong setting is reported here
        if not all(0 < share < 1 for share in self.shares) or list(self.shares) != sorted(set(self.shares), reverse=True):
            raise InputError(f"{self.name}.shares must fall between 1 and 0: got {', '.join(map(str, self.shares))}")
        if self.multiple < 1:
            raise InputError(f"{self.name}.multiple must be at least 1: got {self.multiple}")

    @property
    def needs(self) -> frozenset[str]:
        return self._criterion.needs

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == self.sublayer and site.coupling is not None]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """1 and every share that keeps fewer units than the one before."""
        levels: list[Level] = [_DENSE]
        for share in self.shares:
            if self._kept(site, share) < self._kept(site, levels[-1]):
                levels.append(share)
        return tuple(levels)

    def cost(self, site: Site, level: Level) -> Cost:
        if level == _DENSE:
            return {}
        left = self.left(site, level)
        saved = left.parameters - site.parameters
        passes = site.linears[0].passes
        cost = {"linear_bytes": BYTES_DENSE * saved, "flops_per_token": int(2 * saved * passes)}
        return cost | ({"kv_bytes_per_token": int(passes) * (left.kv_bytes - site.kv_bytes)} if site.kv_bytes else {})

    def left(self, site: Site, level: Level) -> Site:
        if level == _DENSE:
            return site
        coupling, kept = _coupling(site), self._kept(site, level)
        rows, columns = ({name: kept * places.shape[1] for name, places in part.items()} for part in (coupling.rows, coupling.columns))
        linears = (
            replace(item, out_features=rows.get(item.name, item.out_features), in_features=columns.get(item.name, item.in_features))
            for item in site.linears
        )
        return replace(site, linears=tuple(linears), kv_bytes=site.kv_bytes * kept // coupling.units)

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        """The places of the kept units, ascending, int64 `[kept]`: a choice, no part of what is served."""
        best = torch.sort(unit_scores(_coupling(site), self._criterion, material), descending=True, stable=True).indices
        return {"units": best[: self._kept(site, level)].sort().values}

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        coupling, units = _coupling(site), packed["units"]
        rows, columns = (
            {name: places[units].flatten().sort().values for name, places in part.items() if name in material.weights}
            for part in (coupling.rows, coupling.columns)
        )
        return material.cut(rows, columns)

    def _kept(self, site: Site, level: Level) -> int:
        """Units that a level keeps: at least one."""
        units = _coupling(site).units
        exact = float(level) * units
        return min(units, ceil(round(exact, 9) / self.multiple) * self.multiple)

    @cached_property
    def _criterion(self) -> ScoreCriterion:
        criterion = make_criterion(self.criterion)
        if not isinstance(criterion, ScoreCriterion):
            scoring = sorted(name for name, known in known_criteria().items() if issubclass(known, ScoreCriterion))
            raise InputError(f"{self.name}.criterion {self.criterion!r} gives no scores to compare units by; allowed: {', '.join(scoring)}")
        return criterion


def unit_scores(coupling: Coupling, criterion: ScoreCriterion, material: Material) -> Tensor:
    """What the rows and columns of each unit score together, float64 [U]."""
    total = torch.zeros(coupling.units, dtype=torch.float64)
    for name, weight in material.weights.items():
        scores = criterion.scores(weight.float(), material.needed(name)).double() ** criterion.power
        if name in coupling.rows:
            total += scores.sum(1)[coupling.rows[name]].sum(1)
        if name in coupling.columns:
            total += scores.sum(0)[coupling.columns[name]].sum(1)
    return total


def _coupling(site: Site) -> Coupling:
    assert site.coupling is not None
    return site.coupling
