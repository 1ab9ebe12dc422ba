"""Channels of an FFN that are skipped where they matter little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.spaces.activations import activation_of, is_swiglu
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["ActivationSparsity"]

_DENSE = 0
_METHODS = ("chess", "magnitude", "top_k")


@dataclass(frozen=True)
class ActivationSparsity(Knob):
    """The share of an FFN's channels that is set to zero for a token, those that matter least, so that their weights need not be read.

    chess      |act(gate)_c| <= T / mean |up_c|: the least contributions, before up is computed
    magnitude  |act(gate)_c * up_c| <= T: the least inputs of the last linear
    top_k      gate_c <= mean + std * z, over the channels of the token: what a normal distribution leaves a share of

    T is the quantile over the calibration text; `top_k` needs none. FFNs without a gate count as up = 1. What is saved (`chess` and
    `top_k` of a gated FFN: up and down, else down alone) is the share on that text, or of a normal distribution: a mean that other text
    and other levels beside it move, so costs that it is part of are marked as estimated. Bytes are saved with `magnitude` in a SwiGLU
    alone, which is what a kernel serves, and where no other knob decides how these linears are stored.

    Attributes:
        method: `chess`, `magnitude` or `top_k`.
        shares: Levels above 0.

    Source: CHESS, arXiv:2409.01366; TEAL, arXiv:2408.14690; statistical top-k after Spark Transformer, arXiv:2506.06644.
    """

    name: ClassVar[str] = "activation_sparsity"
    kind: ClassVar[Kind] = "runtime"
    conflicts: ClassVar[frozenset[str]] = frozenset({"rank"})

    method: str = "chess"
    shares: tuple[float, ...] = (0.3, 0.5, 0.7)

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise InputError(f"activation_sparsity.method must be one of {', '.join(_METHODS)}: got {self.method!r}")
        if not all(0 < share < 1 for share in self.shares) or list(self.shares) != sorted(set(self.shares)):
            raise InputError(f"activation_sparsity.shares must rise between 0 and 1: got {', '.join(map(str, self.shares))}")

    @property
    def needs(self) -> frozenset[str]:
        return {"chess": frozenset({"activation", "inputs"}), "magnitude": frozenset({"inputs"})}.get(self.method, frozenset())

    @property
    def applies_built(self) -> bool:
        return bool(self.needs)

    @property
    def beside_weights(self) -> bool:
        return True

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "ffn" and site.output is not None]

    def levels(self, site: Site) -> tuple[Level, ...]:
        return (_DENSE, *self.shares)

    def constants(self, structure: Structure) -> Mapping[str, int]:
        """All that could be spared, from which levels take theirs."""
        spared = [self._spared(site, 1) for site in self.sites(structure)]
        return {name: sum(each[name] for each in spared) for name in ("expected_flops", "expected_read_bytes")}

    def cost(self, site: Site, level: Level) -> Cost:
        return {name: -spared for name, spared in self._spared(site, float(level)).items() if spared}

    def kernel(self, site: Site, level: Level) -> str | None:
        return "ffn_sparse" if level != _DENSE and self._served(site) else None

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        """`thresholds`, float32 [inputs of the last linear] (`chess`) or [1] (`magnitude`); at most that much is set to zero."""
        if self.method == "top_k":
            return {}
        output = next(linear for linear in site.linears if linear.name == site.output)
        known = material.needed(output.name)
        inner, share = known["inputs"], float(level)
        if self.method == "magnitude":
            return {"thresholds": _quantile(inner.abs(), share)[None]}
        activation = known["activation"]
        active = activation != 0
        beside = torch.where(active, inner / torch.where(active, activation, 1), 0).abs().sum(0) / active.sum(0).clamp_min(1)
        threshold = _quantile(activation.abs() * beside, share) / beside.clamp_min(torch.finfo(torch.float32).tiny)
        places = material.columns.get(output.name, torch.arange(output.in_features))
        return {"thresholds": torch.zeros(output.in_features).index_copy_(0, places, threshold)}

    def apply_built(self, model: nn.Module, site: Site, level: Level, built: Mapping[str, Tensor]) -> Undo:
        if level == _DENSE:
            return swap(model, {})
        assert site.output is not None
        watched = model.get_submodule(site.output) if self.method == "magnitude" else activation_of(model, site)
        device = next(model.parameters()).device
        threshold = built["thresholds"].to(device) if built else torch.special.ndtri(torch.tensor(float(level), device=device))

        def of_inputs(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (given[0] * (given[0].abs() > threshold), *given[1:])

        def of_activation(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
            if self.method == "chess":
                return result * (result.abs() > threshold)
            least = given[0].mean(-1, keepdim=True) + given[0].std(-1, correction=0, keepdim=True) * threshold
            return result * (given[0] > least)

        hook: Any = (
            watched.register_forward_pre_hook(of_inputs) if self.method == "magnitude" else watched.register_forward_hook(of_activation)
        )
        return hook.remove  # type: ignore[no-any-return]

    def _spared(self, site: Site, share: float) -> dict[str, int]:
        """Operations of so large a share of the channels, and bytes read of those that all tokens decoded at once skip by chance."""
        *before, last = site.linears
        gated = sum(linear.out_features for linear in before) == 2 * last.in_features
        weights, of_all = int(share * last.in_features) * last.out_features, int(share**last.together * last.in_features)
        return {
            "expected_flops": int(2 * weights * last.passes * (2 if gated and self.method != "magnitude" else 1)),
            "expected_read_bytes": BYTES_DENSE * of_all * last.out_features if self._served(site) else 0,
        }

    def _served(self, site: Site) -> bool:
        return self.method == "magnitude" and is_swiglu(site)


def _quantile(numbers: Tensor, share: float) -> Tensor:
    """The number that so large a share is not greater than."""
    return numbers.flatten().kthvalue(max(1, int(share * numbers.numel()))).values
