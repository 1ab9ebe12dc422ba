"""What some sublayers are fed and give for some tokens of the search text, kept for levels that are found by trying.

Of a mixture of experts, under the name of its first stacked linear:

    inputs       the hidden states that experts are fed, float32 [tokens, K]
    routing      the router's logits, float32 [tokens, E]
    outputs      what the chosen experts give together, float32 [tokens, stream]

Of any other FFN, under the name of its last linear:

    inputs       what that linear is fed, float32 [tokens, K]
    activation   what the activation function gives, float32 [tokens, K]: the same, unless another branch multiplies it

Tokens are spread evenly over the text, at most 512 of them and the same ones for all statistics of a sublayer; padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.spaces.activations import activation_of
from autoeff.spaces.material import SAMPLES
from autoeff.spaces.mixture import chosen_experts, experts_of, router_of
from autoeff.spaces.sites import Site

__all__ = ["MOST_TOKENS", "sampled"]

MOST_TOKENS = 512


@contextmanager
def sampled(model: nn.Module, asked: Mapping[Site, Collection[str]]) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
    """Watches sublayers while the dense model runs; the yielded call gives `<linear>.<statistic>` tensors on the CPU.

    Args:
        model: Run as a whole, batch by batch.
        asked: Names of the statistics by FFN sublayer; those that are not kept of tokens are passed over.

    Raises:
        InputError: The part of a sublayer that is asked about was not found.
    """
    found: dict[str, _Tokens] = {}
    masks: list[Tensor | None] = [None]
    handles: list[Any] = []

    def keeps(name: str, tensor_of: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
        kept = found.setdefault(name, _Tokens())

        def hook(_: nn.Module, given: Any, result: Any = None) -> None:
            kept.add(tensor_of(given, result), masks[0])

        return hook

    def batch(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")

    for site, needs in asked.items():
        for name, module, tensor_of, before in _watched(model, site, SAMPLES.intersection(needs)):
            hook = keeps(name, tensor_of)
            handles.append(module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook))
    if handles:
        body: nn.Module = getattr(model, "base_model", model)
        handles.append(body.register_forward_pre_hook(batch, with_kwargs=True))
    try:
        yield lambda: {name: kept.tensor for name, kept in found.items()}
    finally:
        for handle in handles:
            handle.remove()


def _watched(model: nn.Module, site: Site, needs: Collection[str]) -> Iterator[tuple[str, nn.Module, Callable[[Any, Any], Tensor], bool]]:
    """Name of the statistic, module, what of its arguments or result is kept, and whether arguments are all that it takes."""
    if not needs:
        return
    if chosen_experts(site):
        name = experts_of(site)[0].name
        experts = model.get_submodule(name.rpartition(".")[0])
        places: dict[str, tuple[nn.Module, Callable[[Any, Any], Tensor], bool]] = {
            "inputs": (experts, lambda given, _: given[0], True),
            "routing": (router_of(model, site), lambda _, result: result[0], False),
            "outputs": (experts, lambda _, result: result, False),
        }
    else:
        assert site.output is not None
        name = site.output
        places = {"inputs": (model.get_submodule(name), lambda given, _: given[0], True)}
        if "activation" in needs:
            places["activation"] = (activation_of(model, site), lambda _, result: result, False)
    for need in sorted(needs):
        yield f"{name}.{need}", *places[need]


class _Tokens:
    """Rows of what arrives, every one at first and every other one whenever they become too many."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._kept = self._seen = 0
        self._stride = 1

    @property
    def tensor(self) -> Tensor:
        return torch.cat(self._rows)

    @torch.no_grad()
    def add(self, given: Tensor, mask: Tensor | None) -> None:
        rows = given.detach()
        if mask is not None and mask.shape == rows.shape[:-1]:
            rows = rows[mask.bool()]
        rows = rows.flatten(0, -2)
        first = -self._seen % self._stride
        self._seen += len(rows)
        self._rows.append(rows[first :: self._stride].to("cpu", torch.float32))
        self._kept += len(self._rows[-1])
        while self._kept > MOST_TOKENS:
            self._rows = [self.tensor[::2].clone()]
            self._kept, self._stride = len(self._rows[0]), 2 * self._stride
