"""Second-order compensation: weights are fixed column by column, and those still free make good what the fixed ones lost.

With inputs X of a linear and H = X^T X, the output error of a weight change D is tr(D H D^T). Fixing one column at a value costs
least when the columns after it move along the matching row of U, the upper Cholesky factor of H^-1 (H^-1 = U^T U).

Source: Optimal Brain Surgeon in the fixed order of GPTQ, arXiv:2210.17323, and SparseGPT, arXiv:2301.00774.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoeff.errors import InputError

__all__ = ["BLOCK", "compensated", "inverse_factor"]

BLOCK = 128
"""Columns that are compensated one by one before what they owe to the others is paid in one matrix product."""

_DAMPING = (0.01, 0.1, 1.0, 10.0)


def inverse_factor(hessian: Tensor, device: torch.device) -> Tensor:
    """The upper Cholesky factor U [K, K] of the inverse of the damped Hessian, float32 on `device`.

    0.01 times the mean of the diagonal is added to it, and ten times as much up to three times where that is not positive
    definite. Dead inputs (that were always 0) are not counted in the mean; nothing flows to or from them. The factor is found in
    float64, as the square of the condition number of X leaves float32 few digits; it needs 32 K^2 bytes for a moment.

    Args:
        hessian: float [K, K], symmetric; its scale does not matter.
        device: Where to compute.

    Raises:
        InputError: NaN or infinity, or not positive definite under any damping.
    """
    damped = hessian.to(device, torch.float64, copy=True)
    diagonal = damped.diagonal()
    if not bool(damped.isfinite().all()):
        raise InputError(f"a hessian {list(hessian.shape)} holds NaN or infinity; the dense model overflows on the calibration text")
    alive = diagonal[diagonal != 0]
    mean = float(alive.mean()) if len(alive) else 1.0
    added = 0.0
    for damping in _DAMPING:
        diagonal += (damping - added) * mean
        added = damping
        # with both axes reversed L L^T = H gives R R^T = H, R upper triangular, and U = R^-1 without forming H^-1
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            identity = torch.eye(len(damped), dtype=damped.dtype, device=device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1).float()
    raise InputError(
        f"a hessian {list(hessian.shape)} is not positive definite, even with {_DAMPING[-1]:g} times its mean diagonal added; "
        "calibrate on other text, or use a rule that needs no hessian"
    )


def compensated(weight: Tensor, factor: Tensor, fix: Callable[[int, Tensor], Tensor], block: int = BLOCK) -> Tensor:
    """`weight` with every column fixed in turn, and the columns after it moved so as to keep the outputs.

    Args:
        weight: float32 [N, K].
        factor: U of `inverse_factor`, on the same device.
        fix: Gives the values [N] of column j from j and [columns left in the block, N], as compensated so far; the first is j.
        block: Columns in a block.
    """
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    for begin in range(0, len(columns), block):
        part = columns[begin : begin + block]
        end = begin + len(part)
        inside = factor[begin:end, begin:end]
        pivots = inside.diagonal().tolist()
        errors = torch.empty_like(part)
        for i, pivot in enumerate(pivots):
            fixed = fix(begin + i, part[i:])
            torch.sub(part[i], fixed, out=errors[i]).div_(pivot)
            part[i] = fixed
            part[i + 1 :].addr_(inside[i, i + 1 :], errors[i], alpha=-1)
        columns[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return columns.T.clone(memory_format=torch.contiguous_format)
