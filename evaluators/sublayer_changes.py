"""How much each sublayer changes the residual stream of the dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.spaces.knob import swap
from autoeff.spaces.sites import Site, Structure

__all__ = ["sublayer_changes"]


@contextmanager
def sublayer_changes(model: nn.Module, structure: Structure) -> Iterator[Callable[[], Mapping[str, float]]]:
    """Watches the blocks while the dense model runs; the yielded call gives 1 - cosine by sublayer, mean over tokens.

    A block is run again without its last sublayer, then without the one before that too, and so on: two neighbours differ by one
    sublayer. Where sublayers follow each other before a norm, these are the residual streams before and after it. Padding counts like
    other tokens.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    tokens: defaultdict[str, int] = defaultdict(int)
    running = False

    def watch(sublayers: Sequence[Site]) -> Callable[..., None]:
        @torch.no_grad()
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal running
            if running:
                return
            running, undos, after = True, [], _hidden(output)
            try:
                for site in reversed(sublayers):
                    undos.append(swap(model, {name: torch.zeros_like(model.get_parameter(name)) for name in site.outputs}))
                    before = _hidden(block(*args, **kwargs))
                    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                    sums[site.name] += float((1 - cosine.double()).sum())
                    tokens[site.name] += cosine.numel()
                    after = before
            finally:
                for undo in reversed(undos):
                    undo()
                running = False

        return hook

    handles = []
    for index, path in enumerate(structure.blocks):
        sublayers = [site for site in structure.sites if site.block == index and site.kind in ("attention", "ffn")]
        handles.append(model.get_submodule(path).register_forward_hook(watch(sublayers), with_kwargs=True))
    try:
        yield lambda: {name: total / tokens[name] for name, total in sums.items()}
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
