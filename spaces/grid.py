"""The values that codes stand for: evenly spaced, one spacing per row and group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST", "Grid", "grouped"]

LARGEST = float(torch.finfo(torch.float16).max)
"""Values are fp16 in the end; none of a grid may lie beyond."""


def grouped(weight: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """The groups of `weight` [N, K] as [N, ceil(K / size), size], and which of their elements are weights, bool of the same shape.

    Behind the last weight of a row stand repetitions of it, which are no weights; neither is what `mask` (True = kept) excludes.
    """
    n, k = weight.shape
    missing = -k % size
    kept = weight.new_ones((), dtype=torch.bool).expand(n, k) if mask is None else mask
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(n, missing)], dim=1)
        kept = torch.cat([kept, kept.new_zeros(()).expand(n, missing)], dim=1)
    return weight.reshape(n, -1, size), kept.reshape(n, -1, size)


@dataclass(frozen=True)
class Grid:
    """Codes 0 .. 2^bits - 1 as values: `code * scale + minimum`, or `(code - 2^(bits-1)) * scale` without minima.

    Without minima code 0 stays unused, so that values are mirrored around zero.

    Attributes:
        scale: fp16, of any shape that spreads over the weights; not negative.
        minimum: fp16 of the same shape, or None.
        bits: One of 2, 3, 4, 6, 8.
    """

    scale: Tensor
    minimum: Tensor | None
    bits: int

    @classmethod
    def spanning(cls, groups: Tensor, kept: Tensor, bits: int, symmetric: bool) -> Grid:
        """The grid [N, G, 1] from the least to the greatest kept weight, or out to the one of greatest magnitude.

        Args:
            groups: float32 [N, G, size], within the range of fp16.
            kept: bool of the same shape. A group of which nothing is kept has scale and minimum 0.
            bits: One of 2, 3, 4, 6, 8.
            symmetric: Without minima.
        """
        least = torch.aminmax(groups.masked_fill(~kept, torch.inf), dim=2, keepdim=True).min
        greatest = torch.aminmax(groups.masked_fill(~kept, -torch.inf), dim=2, keepdim=True).max
        empty = ~kept.any(2, keepdim=True)
        least, greatest = least.masked_fill_(empty, 0.0), greatest.masked_fill_(empty, 0.0)
        if symmetric:
            return cls(_scale(torch.maximum(-least, greatest), (1 << bits - 1) - 1, torch.zeros_like(least)), None, bits)
        minimum = least.half()  # exact, but for bf16 weights in the range of fp16's subnormals
        return cls(_scale(greatest - minimum.float(), (1 << bits) - 1, minimum.float()), minimum, bits)

    @property
    def zero(self) -> int:
        """The code of the value that the scale is counted from."""
        return 1 << self.bits - 1 if self.minimum is None else 0

    @cached_property
    def step(self) -> Tensor:
        """The scale, float32."""
        return self.scale.float()

    @cached_property
    def start(self) -> Tensor:
        """The value of the code `zero`, float32."""
        return torch.zeros_like(self.step) if self.minimum is None else self.minimum.float()

    @cached_property
    def divisor(self) -> Tensor:
        """The scale to divide by; infinite where it is 0, so that every weight takes the code `zero`."""
        return self.step.masked_fill(self.step == 0, torch.inf)

    def at(self, index: Any) -> Grid:
        """The grid of some groups; `index` as for a tensor."""
        return Grid(self.scale[index].contiguous(), None if self.minimum is None else self.minimum[index].contiguous(), self.bits)

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes of the values nearest to `weight`, as float32."""
        codes = (weight - self.start).div_(self.divisor).round_()
        return codes.add_(self.zero).clamp_(1 if self.minimum is None else 0, (1 << self.bits) - 1)

    def values(self, codes: Tensor) -> Tensor:
        """What float32 `codes` stand for, float32."""
        return (codes - self.zero).mul_(self.step).add_(self.start)


def _scale(span: Tensor, steps: int, start: Tensor) -> Tensor:
    """The least fp16 number that covers `span` in `steps` steps, or the next smaller one where the last value would be no fp16.

    The smaller one lacks less than 1/1024 of the span: under 255/1024 of a step, which rounding to the last code makes good.
    """
    exact = span / steps
    scale = exact.half()
    scale = torch.where(scale.float() < exact, _next(scale, 1), scale)
    return torch.where(start + steps * scale.float() > LARGEST, _next(scale, -1), scale)


def _next(scale: Tensor, step: int) -> Tensor:
    """The fp16 numbers that are `step` representations away from `scale`, which is not negative."""
    return (scale.view(torch.int16) + step).view(torch.float16)
