"""Half-quadratic quantization: round to nearest with minima that forgive outliers; no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.spaces.grid import LARGEST, Grid, grouped
from autoeff.spaces.quantizer import NO_STATISTICS, Codes, Quantizer

__all__ = ["HalfQuadratic"]

_P = 0.7
_STEPS = 20
_BETA, _KAPPA = 10.0, 1.01  # weight of the quadratic term, and its growth per step


@dataclass(frozen=True)
class HalfQuadratic(Quantizer):
    """The grid of round to nearest, shifted by group to lower the sum of |w - w'|^0.7, to which outliers matter less.

    Two closed forms take turns for 20 steps: a shrinkage splits the residuals into outliers E and the rest, then the
    minimum becomes the mean of what is left of the weights without E. Symmetric codes have no minimum; there the scale becomes
    the least-squares one. Residuals are counted in steps of the first grid, so that scaling a weight changes no code (the source
    counts them in units of the weights, where those of trained linears are too small for any to be shrunk). Every group keeps the
    best grid that it met, fp16 rounding included, the first among them: its error is never above that of round to nearest. The
    error may rise on the way, so that no group stops early and none depends on another.

    Source: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models.
    """

    name: ClassVar[str] = "hqq"

    def codes(self, weight: Tensor, bits: int, mask: Tensor | None = None, statistics: Mapping[str, Tensor] = NO_STATISTICS) -> Codes:
        groups, kept = grouped(weight, mask, self.group_of(weight))
        grid = best = Grid.spanning(groups, kept, bits, self.symmetric)
        unit = grid.divisor
        least_error = torch.full_like(unit, torch.inf)
        beta = _BETA
        for _ in range(_STEPS + 1):
            codes = grid.nearest(groups)
            residual = (groups - grid.values(codes)).div_(unit).mul_(kept)
            size = residual.abs()
            powers = size.pow(_P)
            error = powers.sum(2, keepdim=True).masked_fill_(_overflows(grid), torch.inf)
            better = error < least_error
            least_error = torch.where(better, error, least_error)
            best = _chosen(better, grid, best)
            # what the shrinkage leaves to the quadratic term: at most |r|^(p-1) / beta of every residual
            rest = torch.minimum(size, powers.div_(size * beta).nan_to_num_(0.0)).copysign_(residual)
            grid = _refitted(grid, unit, codes, rest, kept)
            beta *= _KAPPA
        return Codes.on(best, best.nearest(groups), weight.shape[1])


def _refitted(grid: Grid, unit: Tensor, codes: Tensor, rest: Tensor, kept: Tensor) -> Grid:
    """The grid that fits best, by least squares, to the values of `codes` plus `rest` (in units)."""
    unit = torch.where(unit.isinf(), 0.0, unit)
    if grid.minimum is not None:
        shift = rest.sum(2, keepdim=True) / kept.sum(2, keepdim=True).clamp_(min=1)
        return replace(grid, minimum=(grid.start + shift * unit).clamp_(-LARGEST, LARGEST).half())
    levels = (codes - grid.zero).mul_(kept)
    growth = (levels * rest).sum(2, keepdim=True) / levels.square().sum(2, keepdim=True).clamp_(min=1)
    return replace(grid, scale=(grid.step + growth * unit).clamp_(0.0, LARGEST).half())


def _overflows(grid: Grid) -> Tensor:
    """Where the last value of a grid is no fp16 number."""
    last = torch.full_like(grid.step, (1 << grid.bits) - 1)
    return grid.values(last) > LARGEST


def _chosen(where: Tensor, a: Grid, b: Grid) -> Grid:
    minimum = None if a.minimum is None or b.minimum is None else torch.where(where, a.minimum, b.minimum)
    return Grid(torch.where(where, a.scale, b.scale), minimum, a.bits)
