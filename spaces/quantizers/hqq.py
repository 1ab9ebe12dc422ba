"""Half-quadratic quantization: round to nearest on the grid that fits best; no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.spaces.grid import LARGEST, Grid, grouped
from autoeff.spaces.quantizer import NO_STATISTICS, Codes, Quantizer

__all__ = ["HalfQuadratic", "fitted"]

_STEPS = 20


@dataclass(frozen=True)
class HalfQuadratic(Quantizer):
    """Round to nearest on a grid that is fitted to its group: scale and minimum take turns with the codes for 20 steps.

    The codes are the nearest, then scale and minimum those of least squares. Every group keeps the grid of least mean |w - w'| that
    it met, fp16 rounding included, that of round to nearest among them. The error may rise on the way, so that no group stops
    early and none depends on another.

    Two things differ from the source. It fits the minimum alone, which at 2 bits can be worse than round to nearest: four values
    from the least weight to the greatest lie too far apart, wherever they begin. And it takes what exceeds |r|^-0.3 / 10 of a
    residual r for an outlier; no residual below 0.17 has any, so trained weights have none, and greater ones would only be fitted
    more slowly. Without that, scaling a weight changes no code.

    With symmetric codes of 2 bits it can do more harm than round to nearest, although it fits better (`benchmarks/method_fronts.py`).

    Source: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models.
    """

    name: ClassVar[str] = "hqq"

    def codes(self, weight: Tensor, bits: int, mask: Tensor | None = None, statistics: Mapping[str, Tensor] = NO_STATISTICS) -> Codes:
        groups, kept = grouped(weight, mask, self.group_of(weight))
        grid = fitted(groups, kept, bits, self.symmetric)
        return Codes.on(grid, grid.nearest(groups), weight.shape[1])


def fitted(groups: Tensor, kept: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid [N, G, 1] of `HalfQuadratic`; arguments are those of `Grid.spanning`."""
    grid = best = Grid.spanning(groups, kept, bits, symmetric)
    least_error = torch.full_like(grid.step, torch.inf)
    for _ in range(_STEPS + 1):
        codes = grid.nearest(groups)
        residual = (groups - grid.values(codes)).mul_(kept)
        error = residual.abs().sum(2, keepdim=True).masked_fill_(_overflows(grid), torch.inf)
        better = error < least_error
        least_error = torch.where(better, error, least_error)
        best = _chosen(better, grid, best)
        grid = _refitted(grid, codes, residual, kept)
    return best


def _refitted(grid: Grid, codes: Tensor, residual: Tensor, kept: Tensor) -> Grid:
    """The grid that fits best, by least squares, to the values of `codes` plus `residual`, which is 0 where nothing is kept."""
    levels = (codes - grid.zero).mul_(kept)
    if grid.minimum is None:
        growth = _slope(levels, residual)
        return replace(grid, scale=(grid.step + growth).clamp_(0.0, LARGEST).half())
    count = kept.sum(2, keepdim=True).clamp_(min=1)
    centre, shift = levels.sum(2, keepdim=True) / count, residual.sum(2, keepdim=True) / count
    growth = _slope((levels - centre).mul_(kept), residual)
    minimum = (grid.start + shift - growth * centre).clamp_(-LARGEST, LARGEST).half()
    return Grid((grid.step + growth).clamp_(0.0, LARGEST).half(), minimum, grid.bits)


def _slope(levels: Tensor, residual: Tensor) -> Tensor:
    """Of the line through the origin that fits best; 0 where all `levels` are 0."""
    squares = levels.square().sum(2, keepdim=True)
    return (levels * residual).sum(2, keepdim=True) / squares.masked_fill_(squares == 0, 1.0)


def _overflows(grid: Grid) -> Tensor:
    """Where the last value of a grid is no fp16 number."""
    last = torch.full_like(grid.step, (1 << grid.bits) - 1)
    return grid.values(last) > LARGEST


def _chosen(where: Tensor, a: Grid, b: Grid) -> Grid:
    minimum = None if a.minimum is None or b.minimum is None else torch.where(where, a.minimum, b.minimum)
    return Grid(torch.where(where, a.scale, b.scale), minimum, a.bits)
