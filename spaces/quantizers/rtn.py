"""Round to nearest, group by group: no data, no search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.spaces.quantizer import Codes, Quantizer

__all__ = ["RoundToNearest"]

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """Every weight at the nearest of evenly spaced values that span its group.

    Asymmetric: 2^b values from the group's least to its greatest weight. Symmetric: 2^b - 1 values around zero (code 0 stays
    unused), out to the weight of greatest magnitude. Minimum and scale are rounded to fp16 first, the scale up, and the codes are
    taken against the rounded ones; so every weight is at most scale / 2 from its value, before that value is itself rounded to 16
    bits. A group of equal weights has scale 0 and keeps its value.

    Source: the baseline of GPTQ, arXiv:2210.17323.
    """

    name: ClassVar[str] = "rtn"

    def codes(self, weight: Tensor, bits: int) -> Codes:
        n, k = weight.shape
        size = min(self.group_size, k)
        # repeating the last weight of a row changes neither end of its group
        padded = torch.cat([weight, weight[:, -1:].expand(n, -k % size)], dim=1) if k % size else weight
        groups = padded.reshape(n, -1, size)
        least, greatest = torch.aminmax(groups, dim=2)
        if self.symmetric:
            zero = 1 << bits - 1
            scale = _scale(torch.maximum(-least, greatest), zero - 1, torch.zeros_like(least))
            codes = groups.div(_divisor(scale)).round_().add_(zero)
        else:
            minimum = least.half()  # exact, but for bf16 weights in the range of fp16's subnormals
            scale = _scale(greatest - minimum.float(), (1 << bits) - 1, minimum.float())
            codes = groups.sub(minimum.float()[:, :, None]).div_(_divisor(scale)).round_()
        return Codes(codes.to(torch.uint8).reshape(n, -1)[:, :k], scale, None if self.symmetric else minimum)


def _scale(span: Tensor, steps: int, start: Tensor) -> Tensor:
    """The least fp16 number that covers `span` in `steps` steps, or the next smaller one where the last value would be no fp16.

    The smaller one lacks less than 1/1024 of the span: under 255/1024 of a step, which rounding to the last code makes good.
    """
    exact = span / steps
    scale = exact.half()
    scale = torch.where(scale.float() < exact, _next(scale, 1), scale)
    return torch.where(start + steps * scale.float() > _LARGEST, _next(scale, -1), scale)


def _next(scale: Tensor, step: int) -> Tensor:
    """The fp16 numbers that are `step` representations away from `scale`, which is not negative."""
    return (scale.view(torch.int16) + step).view(torch.float16)


def _divisor(scale: Tensor) -> Tensor:
    """`scale` to divide a group by; 1 where it is 0, as every weight then takes the middle or least code."""
    return torch.where(scale == 0, 1.0, scale.float())[:, :, None]
