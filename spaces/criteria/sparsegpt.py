"""SparseGPT: pruning whose errors the weights that stay make good, measured on calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.spaces.criterion import Criterion, Pattern, Pruned
from autoeff.spaces.hessian import BLOCK, compensated, inverse_factor

__all__ = ["SparseGPT"]


@dataclass(frozen=True)
class SparseGPT(Criterion):
    """Columns are pruned in turn, and those that follow make good what each loses; so the weights that stay change.

    The score is w^2 / U_jj^2, what pruning the weight costs once later columns have made it good. It is compared within a row and
    block of 128 columns, when compensation reaches the block. Every block keeps its share, with what a share lacks of a whole
    weight carried on, so that the row keeps its number exactly; the source compares all rows of a block at once, which leaves
    their numbers unequal. For n:m the choice is made when compensation reaches a run of m. An input that was always 0 on the
    calibration text costs nothing: its weights go first.

    Source: SparseGPT, arXiv:2301.00774.
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def pruned(self, weight: Tensor, pattern: Pattern, statistics: Mapping[str, Tensor]) -> Pruned:
        k = weight.shape[1]
        hessian = statistics["hessian"]
        factor = inverse_factor(hessian, weight.device)
        worth = (hessian.diagonal() != 0) / factor.diagonal().square()
        run = pattern.of or BLOCK
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)

        def fix(j: int, rest: Tensor) -> Tensor:
            if j % run == 0:
                end = min(j + run, k)
                kept = pattern.kept if pattern.of else pattern.kept * end // k - pattern.kept * j // k
                scores = rest[: end - j].square() * worth[j:end, None]
                mask[:, j:end] = Pattern(kept).mask(scores.T)
            return rest[0].masked_fill(~mask[:, j], 0.0)

        block = run * max(1, BLOCK // run)  # whole runs
        return Pruned(compensated(weight, factor, fix, block), mask)
