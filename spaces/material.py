"""What levels work on: the linears of a sublayer, as the levels in force so far have left them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autoeff.spaces.sites import Linear

__all__ = ["SAMPLES", "STATISTICS", "Material", "dense_weight"]

STATISTICS: Mapping[str, tuple[str, ...]] = {
    "input_norm": ("K",),
    "hessian": ("K", "K"),
    "gradient": ("N", "K"),
    "inputs": ("tokens", "K"),
    "activation": ("tokens", "K"),
    "routing": ("tokens", "experts"),
    "outputs": ("tokens", "stream"),
    "fed": ("stream", "stream"),
    "amounts": ("stream", "K"),
    "mean": ("heads", "size"),
    "covariance": ("heads", "size", "size"),
}
"""Calibration statistics of a linear that there are, and what their axes run along: its outputs N, its inputs K, or something else.

The last two are of the keys or values of an attention, by the name of their site."""
SAMPLES = frozenset({"inputs", "activation", "routing", "outputs"})
"""Those that are kept of some tokens, where a sublayer's last linear is fed or experts are; see `evaluators/samples.py`."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Material:
    """Linears by name, on the CPU. Rows are outputs N, columns are inputs K; both may be fewer than in the model.

    A linear that stands as two factors has them in its place, as `<linear>.v` and `<linear>.u`.

    Attributes:
        weights: 16-bit values [N, K]; zero where pruned.
        masks: bool [N, K], True where kept; linears without one keep every weight.
        rows: Outputs of the dense linear that are left, int64 [N]; linears without an entry have all.
        columns: The same of its inputs, int64 [K].
        statistics: Calibration statistics by `<linear>.<statistic>`, see `STATISTICS`.
        device: Where `build` may compute what takes long.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = _CPU

    def of(self, linears: Collection[str]) -> Material:
        """Some of the linears."""
        parts = (self.weights, self.masks, self.rows, self.columns)
        weights, masks, rows, columns = ({name: part[name] for name in linears if name in part} for part in parts)
        statistics = {name: tensor for name, tensor in self.statistics.items() if name.rpartition(".")[0] in linears}
        return Material(weights, masks, rows, columns, statistics, self.device)

    def needed(self, linear: str) -> dict[str, Tensor]:
        """The statistics of one linear by their bare names."""
        prefix = f"{linear}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.statistics.items() if name.rpartition(".")[0] == linear}

    def with_weights(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> Material:
        """The same with other values, and other masks where given, for some linears."""
        return replace(self, weights={**self.weights, **weights}, masks={**self.masks, **(masks or {})})

    def cut(self, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Material:
        """The linears with only these outputs and inputs left.

        Args:
            rows: Places among the present rows, ascending, int64; linears without an entry keep all.
            columns: The same among the present columns.
        """

        def chosen(tensor: Tensor, name: str) -> Tensor:
            tensor = tensor[rows[name]] if name in rows else tensor
            return tensor[:, columns[name]] if name in columns else tensor

        def composed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
            places = {name: before[name][place] if name in before else place for name, place in now.items() if name in self.weights}
            return {**before, **places}

        statistics = {}
        for name, tensor in self.statistics.items():
            linear, _, statistic = name.rpartition(".")
            for axis, along in enumerate(STATISTICS[statistic]):
                if (place := {"N": rows, "K": columns}.get(along, {}).get(linear)) is not None:
                    tensor = tensor.index_select(axis, place)
            statistics[name] = tensor
        return Material(
            {name: chosen(weight, name) for name, weight in self.weights.items()},
            {name: chosen(mask, name) for name, mask in self.masks.items()},
            composed(self.rows, rows),
            composed(self.columns, columns),
            statistics,
            self.device,
        )

    def factored(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Material:
        """With V [R, K] and U [N, R] in the place of linears that have no mask; statistics become those of the factors.

        U is fed V x: its hessian is V H V^T, whose diagonal gives the norms. Gradients follow by the chain rule.
        """
        weights = {name: weight for name, weight in self.weights.items() if name not in pairs}
        statistics = {name: tensor for name, tensor in self.statistics.items() if name.rpartition(".")[0] not in pairs}
        for name, (v, u) in pairs.items():
            weights |= {f"{name}.v": v, f"{name}.u": u}
            known = self.needed(name)
            if not known:
                continue
            v, u = v.float(), u.float()
            hessian = v @ known["hessian"] @ v.T
            of_v, of_u = dict(known), {"hessian": hessian}
            if (norm := known.get("input_norm")) is not None:
                tokens = norm.square().sum() / known["hessian"].trace().clamp(min=torch.finfo(torch.float32).tiny)
                of_u["input_norm"] = (hessian.diagonal() * tokens).clamp(min=0).sqrt()
            if (gradient := known.get("gradient")) is not None:
                of_v["gradient"], of_u["gradient"] = u.T @ gradient, gradient @ v.T
            statistics |= {f"{name}.{part}.{n}": tensor for part, of in (("v", of_v), ("u", of_u)) for n, tensor in of.items()}
        return replace(self, weights=weights, statistics=statistics)

    def parameter(self, linear: Linear) -> Tensor:
        """The weight as the model's parameter has it: dense shape and layout; what was cut is zero, factors are multiplied."""
        if linear.name in self.weights:
            weight = self.weights[linear.name]
        else:
            v, u = self.weights[f"{linear.name}.v"], self.weights[f"{linear.name}.u"]
            weight = (u.float() @ v.float()).to(v.dtype)
        shape = (linear.rows, linear.in_features)
        if weight.shape != shape:
            rows = self.rows.get(linear.name, torch.arange(shape[0]))
            whole = weight.new_zeros(shape)
            whole[rows[:, None], self.columns.get(linear.name, torch.arange(shape[1]))] = weight
            weight = whole
        if linear.experts:
            return weight.view(linear.experts, linear.out_features, linear.in_features)
        return weight.T.contiguous() if linear.transposed else weight


def dense_weight(parameter: Tensor, linear: Linear) -> Tensor:
    """The weight [N, K] (experts stacked along N) of a parameter in the model's layout."""
    if linear.experts:
        return parameter.flatten(0, 1)
    return parameter.T if linear.transposed else parameter
