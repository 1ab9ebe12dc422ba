"""One pass of the dense model over text beside that of the search feeds the statistics of inputs.

Statistics are collected only if a knob asks for them, for every linear, over its inputs X [tokens, K] without padding:

    input_norm   the Euclidean norm over tokens of every input, float32 [K] (Wanda, arXiv:2306.11695)
    hessian      X^T X / tokens, float32 [K, K] (GPTQ, arXiv:2210.17323; SparseGPT, arXiv:2301.00774)
    gradient     dS/dW, float32 [N, K], from a pass of its own, see `gradients` (NIRVANA, arXiv:2509.14230)

Linears that are fed the same tensor (q/k/v, gate/up) share one statistic. A hessian is accumulated on the device of the model:
4 K^2 bytes for every distinct input of every block, at once. A Llama of 7 B parameters (K = 4096 three times, 11008 once) takes
0.7 GB a block, 22 GB in all. Gradients are accumulated on the CPU: 4 bytes per weight of the linears that need one, 26 GB there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.evaluators.forward import fed_to
from autoeff.evaluators.widening import wide_for_gradients
from autoeff.spaces.material import STATISTICS, dense_weight
from autoeff.spaces.sites import Linear

__all__ = ["collected", "explained", "gradients"]

_OF_INPUTS = frozenset({"hessian", "input_norm"})
_CHUNK_LOGITS = 1 << 24  # 64 MiB of float32 logits at a time


@contextmanager
def collected(model: nn.Module, linears: Collection[str], needs: Collection[str]) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
    """Watches `linears` while the dense model runs; the yielded call gives `<linear>.<statistic>` tensors of inputs on the CPU.

    Tensors of linears that share an input are the same object.

    Raises:
        InputError: A statistic that is not known.
    """
    if unknown := sorted(set(needs) - STATISTICS.keys()):
        raise InputError(f"unknown calibration statistic {unknown[0]!r}; known: {', '.join(sorted(STATISTICS))}")
    watch = _Watch(needs)
    handles: list[Any] = []
    if _OF_INPUTS.intersection(needs):
        body: nn.Module = getattr(model, "base_model", model)
        handles = [body.register_forward_pre_hook(watch.batch, with_kwargs=True), body.register_forward_hook(watch.done)]
        handles += [model.get_submodule(name).register_forward_pre_hook(watch.linear(name), with_kwargs=True) for name in linears]
    try:
        yield watch.statistics
    finally:
        for handle in handles:
            handle.remove()


def gradients(
    model: nn.Module, linears: Collection[Linear], head: nn.Linear | None, inputs: Tensor, mask: Tensor | None
) -> dict[str, Tensor]:
    """`<linear>.gradient`: how S changes with every weight, float32 [N, K] on the CPU.

    S is the mean over windows and vocabulary of the greatest logit along the window, so that a window's S has the derivative
    sum_v W_v / V to the hidden states, each v at the token that is greatest for it: no logits are kept. Windows go one by one, so
    the device holds the activations of one, and the gradient of one weight.

    Args:
        model: Its parameters are left as they were.
        linears: None of them experts.
        head: Output head; None for encoders, whose hidden features stand for logits.
        inputs: Windows, int64 [windows, tokens], or images, float32 [images, C, H, W].
        mask: Attention mask of the same shape with the padding on the right, or None.
    """
    body: Any = getattr(model, "base_model", model)
    options = {} if head is None else {"use_cache": False}
    weights = {linear: model.get_parameter(linear.weight) for linear in linears}
    sums = {linear: torch.zeros(weight.shape) for linear, weight in weights.items()}

    def taken(total: Tensor) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            total.add_(weight.grad.to("cpu", torch.float32), alpha=1 / len(inputs))
            weight.grad = None

        return hook

    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    handles: list[Any] = []
    try:
        with wide_for_gradients(model), torch.enable_grad():
            for linear, weight in weights.items():
                parameter: Any = weight.requires_grad_()  # the hook has no types
                handles.append(parameter.register_post_accumulate_grad_hook(taken(sums[linear])))
            for i in range(len(inputs)):
                row = fed_to(model, inputs[i : i + 1] if mask is None else inputs[i : i + 1, : int(mask[i].sum())])
                hidden: Tensor = body(**{body.main_input_name: row}, **options).last_hidden_state
                torch.autograd.backward(hidden, _of_greatest_logits(hidden, head), inputs=list(weights.values()))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
    return {f"{linear.name}.gradient": dense_weight(total, linear).contiguous() for linear, total in sums.items()}


def explained(hessian: Tensor) -> tuple[float, ...]:
    """The share of each principal direction in the second moment of inputs, the greatest first, of a `hessian` [K, K]."""
    powers = torch.linalg.eigvalsh(hessian.double()).flip(0).clamp(min=0)
    return tuple((powers / powers.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist())


@torch.no_grad()
def _of_greatest_logits(hidden: Tensor, head: nn.Linear | None) -> Tensor:
    """The derivative of the mean over the vocabulary of the greatest logit to the hidden states [1, tokens, hidden]."""
    tokens = hidden[0].float()
    vocabulary = torch.eye(tokens.shape[1], device=tokens.device) if head is None else head.weight
    found = torch.zeros_like(tokens)
    for rows in torch.split(vocabulary, max(1, _CHUNK_LOGITS // len(tokens))):
        greatest = (tokens @ rows.float().T).argmax(0)  # the head's bias is the same at every token
        found.index_add_(0, greatest, rows.float(), alpha=1 / len(vocabulary))
    return found[None].to(hidden.dtype)


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
