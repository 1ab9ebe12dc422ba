"""Blocks that are left out, or gone through twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, DynamicLayer

from autoeff.errors import InputError
from autoeff.spaces.blocks import Call, around_block, hidden_of
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["Passes"]

_DENSE = 1


@dataclass(frozen=True)
class Passes(Knob):
    """How often hidden states go through a block: once, not at all, or twice.

    No pass is `skip` of both sublayers: zeros in their output projections. Two passes take twice the operations, read the weights twice
    for every token, and keep keys and values of their own for each pass; no byte more is stored. What looks at several passes of a block
    as one (`skip`, knobs of the cache) is not searched together with it. No checkpoint says that a block runs
    twice: that stands in the recipe.

    Attributes:
        most: 1 or 2.

    Source: Chain of Layers, "Skip a Layer or Loop it?", arXiv:2507.07996.
    """

    name: ClassVar[str] = "passes"
    kind: ClassVar[Kind] = "structure"
    conflicts: ClassVar[frozenset[str]] = frozenset({"kv_bits", "kv_budget", "kv_rank", "skip"})
    uniform: ClassVar[bool] = False
    of_blocks: ClassVar[bool] = True

    most: int = 2

    def __post_init__(self) -> None:
        if self.most not in (1, 2):
            raise InputError(f"passes.most must be 1 or 2: got {self.most}")

    @property
    def beside_weights(self) -> bool:
        return True

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "block"]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """The dense level, then by falling cost: the only knob with a level that costs more."""
        return (_DENSE, 2, 0) if self.most == 2 else (_DENSE, 0)

    def cost(self, site: Site, level: Level) -> Cost:
        more = int(level) - _DENSE
        if not more:
            return {}
        cost = {"flops_per_token": 2 * more * site.parameters_per_token}
        if site.kv_bytes:
            cost["kv_bytes_per_token"] = more * site.kv_bytes
        return cost if more > 0 else {"linear_bytes": -BYTES_DENSE * site.parameters, **cost}

    def silences(self, site: Site, level: Level) -> bool:
        return level == 0

    def left(self, site: Site, level: Level) -> Site:
        return replace(site, linears=tuple(replace(linear, passes=int(level)) for linear in site.linears))

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == _DENSE:
            return swap(model, {})
        if level == 0:
            return swap(model, {name: torch.zeros_like(model.get_parameter(name)) for name in site.outputs})
        layers = [module for module in model.get_submodule(site.name).modules() if isinstance(getattr(module, "layer_idx", None), int)]

        def twice(original: Call) -> Call:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                result = hidden_of(original(hidden, *args, **kwargs))
                cache = next((item for item in (*args, *kwargs.values()) if isinstance(item, DynamicCache)), None)
                with _slot(cache, layers):
                    return original(result, *args, **kwargs)

            return forward

        return around_block(model, site.name, twice)


@contextmanager
def _slot(cache: DynamicCache | None, layers: Sequence[Any]) -> Iterator[None]:
    """Lets a block's attention keep the keys and values of its second pass behind those of all first ones."""
    if cache is None or not layers:
        yield
        return
    first = [layer.layer_idx for layer in layers]
    of_first = int(layers[0].config.num_hidden_layers)
    while len(cache.layers) < 2 * of_first:
        cache.layers.append(DynamicLayer())
    for layer, index in zip(layers, first, strict=True):
        layer.layer_idx = of_first + index
    try:
        yield
    finally:
        for layer, index in zip(layers, first, strict=True):
            layer.layer_idx = index
