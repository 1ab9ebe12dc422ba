"""What launches of products have in common: the tensor that they write to, and parts of K that are summed in a launch of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None

__all__ = ["check_output", "launch"]


def check_output(x: Tensor, y: Tensor, n: int) -> None:
    """Refuses a y that is not contiguous [M, N] in the dtype of a contiguous x [M, K].

    Raises:
        ValueError: With what was found.
    """
    if tuple(y.shape) != (x.shape[0], n) or y.dtype != x.dtype or not (x.is_contiguous() and y.is_contiguous()):
        raise ValueError(f"y must be contiguous {x.dtype} {(x.shape[0], n)}: got {y.dtype} {tuple(y.shape)}")


def launch(what: str, y: Tensor, bias: Tensor | None, splits: int, arguments: Callable[[Tensor | None, Tensor], tuple[Any, ...]]) -> None:
    """Runs a kernel into y [M, N].

    Args:
        what: For people, such as `2:4 weights`.
        y: Where to.
        bias: [N], added by the kernel, or to the sum of the parts.
        splits: Parts of K; more than one are written as float32 [splits, M, N] and summed behind each other: the same bits at every run.
        arguments: From the bias that the kernel adds and the tensor that it writes to, what `kernel[grid](*arguments, **options)` takes.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if triton is None:
        raise RuntimeError(f"{what} on a GPU need Triton, which is not installed: pip install 'triton>=3.6'")
    if not y.numel():
        return
    sums = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=y.device)
    kernel, grid, given, options = arguments(bias if splits == 1 else None, sums)
    with torch.cuda.device(y.get_device()):  # on the CPU (-1) it does nothing
        kernel[grid](*given, **options)
    if splits > 1:
        total = sums.sum(0)
        y.copy_(total if bias is None else total.add_(bias))
