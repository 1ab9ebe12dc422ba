"""Large matrices kept in the 16 bits that they have, and computed with in float32, one module at a time.

A CPU computes candidates in float32, since bfloat16 products lose the small KLs that a search compares. Float32 copies of all
weights are needless for that: while a module runs, its parameters point to a scratch that holds the same values in float32.
The results are bit for bit those of a model that is float32 throughout. Copying takes 1-2 % of a pass over 2,048 tokens (16 ms
beside 750 ms for a matrix [8192, 2048] on two cores), and the weights may stay mapped from the checkpoint's file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.evaluators.quality import CHUNK_ROWS
from autoeff.spaces.sites import Linear

__all__ = ["narrow_names", "scratch_elements", "wide_for_gradients", "widen_on_use"]


def narrow_names(model: nn.Module, linears: Iterable[Linear]) -> frozenset[str]:
    """Names of the parameters that may stay in 16 bits: the searchable linears, and plain token embedding and head.

    Embeddings that do more than look up (Gemma's scale theirs by a number rounded to the weight's dtype) are left in float32, and
    so is a head that is tied to one.
    """
    tables = [table for table in _tables(model) if table is not None]
    odd = {id(table.weight) for table in tables if type(table) not in (nn.Embedding, nn.Linear)}
    plain = {id(table.weight) for table in tables} - odd
    chosen = plain | {id(model.get_parameter(linear.weight)) for linear in linears}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in chosen)


def scratch_elements(model: nn.Module, narrow: Collection[str]) -> int:
    """Elements of the scratch: the most that one module's parameters have."""
    kept = {id(model.get_parameter(name)) for name in narrow}
    tables = _tables(model)
    owned = (sum(p.numel() for p in m.parameters(recurse=False) if id(p) in kept) for m in model.modules() if not _is_in(m, tables))
    return max(owned, default=0)


def widen_on_use(model: nn.Module, narrow: Collection[str]) -> None:
    """Lets the modules of `model` compute in float32 with the parameters in `narrow`, which are kept as they are; for good.

    Values put in their place later, in 16 bits too, are computed with likewise.
    """
    kept = {id(model.get_parameter(name)) for name in narrow}
    embedding, head = _tables(model)
    scratch = _Scratch()
    for module in model.modules():
        parameters = [parameter for parameter in module.parameters(recurse=False) if id(parameter) in kept]
        if not parameters:
            continue
        if module is embedding:
            module.forward = _looked_up(module)
        elif module is head:
            module.forward = _head_product(module)
        else:
            module.forward = _widened(module.forward, parameters, scratch)


@contextmanager
def wide_for_gradients(model: nn.Module) -> Iterator[None]:
    """Lets a model that is float16 on a GPU compute in float32, since small gradients are 0 in float16; afterwards it is what it was.

    It takes 4 bytes a parameter more for as long. A CPU computes in float32 anyway, and bfloat16 has the range of float32.
    """
    tensors = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.dtype == torch.float16]
    before = [(tensor, tensor.data) for tensor in tensors if tensor.device.type != "cpu"]
    for tensor, data in before:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


class _Scratch:
    """Float32 memory that is used again and again: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in float32; they hold until the next call."""
        elements = sum(tensor.numel() for tensor in tensors)
        if elements > self._memory.numel():
            self._memory = torch.empty(elements)
        parts = torch.split(self._memory[:elements], [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _widened(original: Callable[..., Any], parameters: Sequence[nn.Parameter], scratch: _Scratch) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        stored = [parameter.data for parameter in parameters]
        for parameter, wide in zip(parameters, scratch.copies(stored), strict=True):
            parameter.data = wide
        try:
            return original(*args, **kwargs)
        finally:
            for parameter, data in zip(parameters, stored, strict=True):
                parameter.data = data

    return forward


def _looked_up(embedding: nn.Module) -> Callable[[Tensor], Tensor]:
    original = embedding.forward

    def forward(ids: Tensor) -> Tensor:
        found: Tensor = original(ids)
        return found.float()

    return forward


def _head_product(head: Any) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        logits = hidden.new_empty((*hidden.shape[:-1], len(head.weight)))
        for start in range(0, len(head.weight), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits[..., rows] = nn.functional.linear(hidden, head.weight[rows].float(), None if head.bias is None else head.bias[rows])
        return logits

    return forward


def _tables(model: Any) -> tuple[Any, Any]:
    """Token embedding and output head, each None where there is none."""
    return model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()


def _is_in(module: nn.Module, others: Iterable[Any]) -> bool:
    return any(module is other for other in others)
