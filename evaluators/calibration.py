"""One pass of the dense model over the search text feeds everything: the teacher, the kept block states, the statistics.

Statistics are collected only if a knob asks for them. Known: `input_norm`, the Euclidean norm over tokens of every input
feature of a linear, float32 [K] (Wanda, arXiv:2306.11695; one column norm of X).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.errors import InputError

__all__ = ["KNOWN_STATISTICS", "collected"]

KNOWN_STATISTICS = frozenset({"input_norm"})


@contextmanager
def collected(model: nn.Module, linears: Collection[str], needs: Collection[str]) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
    """Watches `linears` while the dense model runs; the yielded call gives `<linear>.<statistic>` tensors.

    Raises:
        InputError: A statistic that is not known.
    """
    if unknown := sorted(set(needs) - KNOWN_STATISTICS):
        raise InputError(f"unknown calibration statistic {unknown[0]!r}; known: {', '.join(sorted(KNOWN_STATISTICS))}")
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            added = inputs[0].float().flatten(0, -2).square().sum(0)
            squares[name] = squares[name] + added if name in squares else added

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in linears if needs]
    try:
        yield lambda: {f"{name}.input_norm": torch.sqrt(total).cpu() for name, total in squares.items()}
    finally:
        for handle in handles:
            handle.remove()
