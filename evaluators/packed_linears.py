"""Linears of a candidate that compute with packed codes, by the modules with which they would be served.

A linear's module stays where it is, with its hooks and its dense weight. While a level is in force its `forward` is that of the served
module; where units are cut, the kernel is fed the inputs that are left, and its outputs stand among zeros in the dense shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from autoeff.evaluators.bank import Bank
from autoeff.evaluators.serving import Form, Stored, linear_of, served
from autoeff.spaces.knob import Undo
from autoeff.spaces.sites import Structure

__all__ = ["PackedLinears"]


class PackedLinears:
    """Puts packed linears in force in a model.

    Attributes:
        in_force: Names of the linears that compute with codes now.
        calls: How often they have done so; whoever counts sets it to 0.
    """

    def __init__(self, model: nn.Module, structure: Structure, bank: Bank) -> None:
        self.in_force: set[str] = set()
        self.calls = 0
        self._model, self._bank = model, bank
        self._linears = {linear.name: linear for linear in structure.linears}

    def put(self, forms: Mapping[str, Sequence[Form]]) -> dict[str, Undo]:
        """Lets those of some linears compute with codes that kernels read whole, and returns calls that restore their modules, by name."""
        undos: dict[str, Undo] = {}
        for name, parts in forms.items():
            device = self._model.get_parameter(self._linears[name].weight).device
            if all(served(form.kernel, form.settings, form.linear, device) for form in parts):
                undos[name] = self._replaced(name, self._forward(name, parts, device))
        return undos

    def _replaced(self, name: str, forward: Callable[[Tensor], Tensor]) -> Undo:
        module = self._model.get_submodule(name)
        before = vars(module).get("forward")

        def counted(x: Tensor) -> Tensor:
            self.calls += 1
            return forward(x)

        def undo() -> None:
            self.in_force.remove(name)
            if before is None:
                del module.forward
            else:
                module.forward = before

        self.in_force.add(name)
        module.forward = counted
        return undo

    def _forward(self, name: str, parts: Sequence[Form], device: torch.device) -> Callable[[Tensor], Tensor]:
        linear, original = self._linears[name], self._model.get_submodule(name)
        own, bias = self._model.get_parameter(linear.weight), original.bias.data if isinstance(original.bias, Tensor) else None
        weights = _Placed(self._bank, device)
        if (parts[0].linear.in_features, parts[-1].linear.out_features) == (linear.in_features, linear.out_features):
            return linear_of(own, bias, parts, weights)
        cut = self._bank.material(tuple(step for step in parts[0].chain if step.knob.kind == "structure"), [name])
        rows, columns = (None if (places := found.get(name)) is None else places.to(device) for found in (cut.rows, cut.columns))
        left = linear_of(own, None, parts, weights)

        def forward(x: Tensor) -> Tensor:
            y: Tensor = left(x if columns is None else x.index_select(-1, columns))
            if rows is not None:
                y = y.new_zeros(*y.shape[:-1], linear.out_features).index_copy_(-1, rows, y)
            return y if bias is None else y + bias

        return forward


class _Placed(Stored):
    """Entries of a bank whose codes stay on the device."""

    def __init__(self, bank: Bank, device: torch.device) -> None:
        super().__init__(bank)
        self._device = device

    def packed(self, form: Form) -> dict[str, Tensor]:
        return self._bank.served(form.chain, form.linear.name, self._device)
