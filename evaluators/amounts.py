"""How much each neuron of an FFN gives, against what the FFN is fed: what its neurons are divided by (see `ffn_experts`).

With x for what the first linear is fed and a 1 behind it, y for what the last linear is fed, under the name of the latter, over all tokens
but padding:

    fed       mean of x x^T, float32 [stream + 1, stream + 1]
    amounts   mean of x |y|^T, float32 [stream + 1, K]

Both are accumulated on the device of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.spaces.sites import Site

__all__ = ["amounts"]


@contextmanager
def amounts(model: nn.Module, sites: Collection[Site]) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
    """Watches FFNs while the dense model runs; the yielded call gives `<last linear>.<statistic>` tensors on the CPU."""
    fed: dict[str, Tensor] = {}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    masks: list[Tensor | None] = [None]

    def rows(given: Tensor) -> Tensor:
        found, mask = given.detach().float(), masks[0]
        return (found[mask.bool()] if mask is not None and mask.shape == found.shape[:-1] else found).flatten(0, -2)

    def first(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            fed[name] = rows(given[0])

        return hook

    def last(name: str) -> Callable[..., None]:
        @torch.no_grad()
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            y, x = rows(given[0]).abs(), torch.nn.functional.pad(fed.pop(name), (0, 1), value=1.0)
            before, of_x, of_y = sums.get(name, (0, x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])))
            tokens = before + len(x)
            for total, other in ((of_x, x), (of_y, y)):
                total.addmm_(x.T, other, beta=before / tokens, alpha=1 / tokens)
            sums[name] = tokens, of_x, of_y

        return hook

    def batch(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")

    handles: list[Any] = []
    for site in sites:
        assert site.output is not None
        handles.append(model.get_submodule(site.linears[0].name).register_forward_pre_hook(first(site.output)))
        handles.append(model.get_submodule(site.output).register_forward_pre_hook(last(site.output)))
    if handles:
        body: nn.Module = getattr(model, "base_model", model)
        handles.append(body.register_forward_pre_hook(batch, with_kwargs=True))
    try:
        yield lambda: {
            f"{name}.{what}": total.cpu() for name, (_, *both) in sums.items() for what, total in zip(("fed", "amounts"), both, strict=True)
        }
    finally:
        for handle in handles:
            handle.remove()
