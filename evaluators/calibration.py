"""One pass of the dense model over the search text feeds everything: the teacher, the kept block states, the statistics.

Statistics are collected only if a knob asks for them, for every linear, over its inputs X [tokens, K] without padding:

    input_norm   the Euclidean norm over tokens of every input, float32 [K] (Wanda, arXiv:2306.11695)
    hessian      X^T X / tokens, float32 [K, K] (GPTQ, arXiv:2210.17323; SparseGPT, arXiv:2301.00774)

Linears that are fed the same tensor (q/k/v, gate/up) share one statistic. A hessian is accumulated on the device of the model:
4 K^2 bytes for every distinct input of every block, at once. A Llama of 7 B parameters (K = 4096 three times, 11008 once) takes
0.7 GB a block, 22 GB in all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.errors import InputError

__all__ = ["KNOWN_STATISTICS", "collected"]

KNOWN_STATISTICS = frozenset({"hessian", "input_norm"})


@contextmanager
def collected(model: nn.Module, linears: Collection[str], needs: Collection[str]) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
    """Watches `linears` while the dense model runs; the yielded call gives `<linear>.<statistic>` tensors on the CPU.

    Tensors of linears that share an input are the same object.

    Raises:
        InputError: A statistic that is not known.
    """
    if unknown := sorted(set(needs) - KNOWN_STATISTICS):
        raise InputError(f"unknown calibration statistic {unknown[0]!r}; known: {', '.join(sorted(KNOWN_STATISTICS))}")
    watch = _Watch(needs)
    handles: list[Any] = []
    if needs:
        body: nn.Module = getattr(model, "base_model", model)
        handles = [body.register_forward_pre_hook(watch.batch, with_kwargs=True), body.register_forward_hook(watch.done)]
        handles += [model.get_submodule(name).register_forward_pre_hook(watch.linear(name), with_kwargs=True) for name in linears]
    try:
        yield watch.statistics
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """What is known of the inputs so far, by the first linear that was fed them."""

    def __init__(self, needs: Collection[str]) -> None:
        self._needs = needs
        self._sources: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self._squares: dict[str, Tensor] = {}
        self._hessians: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._fed: tuple[Tensor | None, str] = (None, "")  # the last input, and the linear that was first fed it

    def batch(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def done(self, *_: Any) -> None:
        self._fed, self._mask = (None, ""), None

    def linear(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            fed: Tensor = next(iter((*args, *kwargs.values())))
            if fed is not self._fed[0]:
                self._fed = (fed, name)
            source = self._sources.setdefault(name, self._fed[1])
            assert source == self._fed[1]  # which linears share an input is the model's structure
            if source == name:
                self._add(name, fed)

        return hook

    def statistics(self) -> dict[str, Tensor]:
        found: dict[str, dict[str, Tensor]] = {}
        for name in self._tokens:
            found[name] = {}
            if "input_norm" in self._needs:
                found[name]["input_norm"] = torch.sqrt(self._squares[name]).cpu()
            if "hessian" in self._needs:
                found[name]["hessian"] = self._hessians[name].cpu()
        return {f"{name}.{statistic}": t for name, source in self._sources.items() for statistic, t in found[source].items()}

    @torch.no_grad()
    def _add(self, name: str, fed: Tensor) -> None:
        inputs = fed.detach().float()
        if self._mask is not None and self._mask.shape == inputs.shape[:-1]:
            inputs = inputs[self._mask.bool()]
        inputs = inputs.flatten(0, -2)
        if "input_norm" in self._needs:
            added = inputs.square().sum(0)
            self._squares[name] = self._squares[name] + added if name in self._squares else added
        before = self._tokens.get(name, 0)
        self._tokens[name] = tokens = before + len(inputs)
        if "hessian" in self._needs:
            if name not in self._hessians:
                self._hessians[name] = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            # a running mean needs no second copy to be divided in the end
            self._hessians[name].addmm_(inputs.T, inputs, beta=before / tokens, alpha=1 / tokens)
