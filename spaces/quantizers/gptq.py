"""GPTQ: rounding whose errors the weights still to be rounded make good, measured on calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.spaces.grid import grouped
from autoeff.spaces.hessian import compensated, inverse_factor
from autoeff.spaces.quantizer import NO_STATISTICS, Codes, Quantizer
from autoeff.spaces.quantizers.hqq import fitted

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ(Quantizer):
    """Columns are rounded in turn, most active input first; what each loses is made good by those that follow.

    Scales and minima are those of half-quadratic quantization, fitted to the original weights before anything is rounded ("static
    groups"): the order by activity visits the groups in between one another, so there is no moment at which a group starts, and
    they stay where the packed format wants them. The source takes those of round to nearest, whose values lie too far apart at 2
    and 3 bits. With uncorrelated inputs of equal norm every weight takes the nearest value. An input that was always 0 on the
    calibration text is rounded to nearest and takes no part. Pruned weights stay zero; what compensation would have moved them by
    is passed on to the columns after them.

    Source: GPTQ, arXiv:2210.17323.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def codes(self, weight: Tensor, bits: int, mask: Tensor | None = None, statistics: Mapping[str, Tensor] = NO_STATISTICS) -> Codes:
        size = self.group_of(weight)
        grid = fitted(*grouped(weight, mask, size), bits, self.symmetric)
        hessian = statistics["hessian"].to(weight.device)
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = inverse_factor(hessian[order][:, order], weight.device)
        groups = [grid.at((slice(None), g, 0)) for g in range(grid.scale.shape[1])]
        columns: list[int] = order.tolist()
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        pruned = None if mask is None else ~mask.T.contiguous()

        def fix(j: int, rest: Tensor) -> Tensor:
            column = columns[j]
            group = groups[column // size]
            nearest = group.nearest(rest[0])
            codes[:, column] = nearest
            values = group.values(nearest)
            if pruned is not None:
                values.masked_fill_(pruned[column], 0.0)
            return values

        compensated(weight[:, order], factor, fix)
        return Codes(codes, grid.scale[:, :, 0], None if grid.minimum is None else grid.minimum[:, :, 0])
