"""Low-rank adapters on linears: what they add, where they stand, and how many of their terms are in force.

An adapter adds B A x to the output of a linear, whatever that linear computes: dense values, decoded codes, masked ones. Its terms are
ordered, and the first r of them are an adapter of rank r.

Source: LoRA, arXiv:2106.09685; ranks as prefixes after DyLoRA, arXiv:2210.07558.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["Adapter", "adapter_of", "adapters_at", "attached", "scale", "with_rank"]

_KEPT_AS = "autoeff_adapter"


def scale(rank: int) -> float:
    """What the terms are multiplied by: 2 / sqrt(rank), so that a learning rate does as much at one rank as at another.

    In terms of LoRA alpha is 2 sqrt(rank). Source: rsLoRA, arXiv:2312.03732.
    """
    return 2 / math.sqrt(rank)


class Adapter:
    """scale B A x with the first `rank` terms; no module, so that it is in no state dict of the model.

    Attributes:
        a: float32 [R, K].
        b: float32 [N, R].
        rank: Terms in force, from 0 to R.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b, self.rank = a, b, len(a)

    def added(self, x: Tensor) -> Tensor:
        """[..., N] in the dtype of the factors, of x [..., K]."""
        return linear(linear(x.to(self.a.dtype), self.a[: self.rank]), self.b[:, : self.rank]) * scale(self.rank)


def attached(model: nn.Module, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
    """Adds adapters to linears by module path, in full; the returned call takes them away. One adapter a linear."""
    handles: list[Any] = []
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        assert adapter_of(module) is None
        vars(module)[_KEPT_AS] = adapter
        handles.append(module.register_forward_hook(_add, with_kwargs=True))

    def undo() -> None:
        for name, handle in zip(adapters, handles, strict=True):
            handle.remove()
            del vars(model.get_submodule(name))[_KEPT_AS]

    return undo


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a linear."""
    found: Adapter | None = vars(module).get(_KEPT_AS)
    return found


def adapters_at(model: nn.Module, linears: Iterable[str]) -> list[Adapter]:
    """Those of some linears.

    Raises:
        ValueError: One has none.
    """
    found = []
    for name in linears:
        if (adapter := adapter_of(model.get_submodule(name))) is None:
            raise ValueError(f"{name} has no adapter")
        found.append(adapter)
    return found


def with_rank(adapters: Iterable[Adapter], rank: int) -> Callable[[], None]:
    """Leaves the first `rank` terms in force; the returned call puts those back that were."""
    before = [(adapter, adapter.rank) for adapter in adapters]
    for adapter, _ in before:
        adapter.rank = rank

    def undo() -> None:
        for adapter, was in before:
            adapter.rank = was

    return undo


def _add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
    adapter = adapter_of(module)
    assert adapter is not None
    if not adapter.rank:
        return output
    return output + adapter.added(next(iter((*args, *kwargs.values())))).to(output.dtype)
