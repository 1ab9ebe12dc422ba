"""Dense FFNs divided into experts, of which a token is sent to some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.spaces.activations import is_swiglu
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["FfnExperts"]

_DENSE = 1
_DAMPING = 0.01  # of the mean variance of an input, as GPTQ has it
_ROUNDS = 30  # of a power iteration; a direction close to the main one does as well


@dataclass(frozen=True)
class FfnExperts(Knob):
    """The share of its experts that an FFN sends a token to: as many for every token, chosen by a linear router.

    Experts are equal parts of the neurons, with the values of the checkpoint. How much a neuron gives, |what the last linear is fed| times
    the norm of its column there, is predicted from what the FFN is fed by least squares over the calibration text. Neurons of which the
    same is predicted form an expert: they are halved along the main direction of their predictions, again and again. The router's score of
    an expert is what its neurons are predicted to give together, so nothing is trained. Sent to all, the model is the dense one.

    Saved are the operations of the experts that are left out, less those of the router, and, in a SwiGLU whose linears no other knob
    stores otherwise, the reading of experts to which no token of the batch is sent, at the least. The router is stored besides.

    Attributes:
        neurons: Of an expert. Fewer follow tokens more closely, and the router grows: it takes 1 / (3 x neurons) of a SwiGLU's operations.
        shares: Levels below 1; the number of experts is rounded up.

    Source: MoEfication, arXiv:2110.01786, of which this is the form that needs no training.
    """

    name: ClassVar[str] = "ffn_experts"
    kind: ClassVar[Kind] = "runtime"
    conflicts: ClassVar[frozenset[str]] = frozenset({"activation_sparsity", "rank"})

    neurons: int = 16
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)

    def __post_init__(self) -> None:
        if self.neurons < 1:
            raise InputError(f"ffn_experts.neurons must be at least 1: got {self.neurons}")
        if not all(0 < share < 1 for share in self.shares) or list(self.shares) != sorted(set(self.shares), reverse=True):
            raise InputError(f"ffn_experts.shares must fall between 1 and 0: got {', '.join(map(str, self.shares))}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"fed", "amounts"})

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "ffn" and site.output is not None and len(self.levels(site)) > 1]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """1 and every share that takes fewer operations than the one before, the router's included."""
        levels: list[Level] = [_DENSE]
        for share in self.shares:
            if self._operations(site, share) < self._operations(site, levels[-1]):
                levels.append(share)
        return tuple(levels)

    def constants(self, structure: Structure) -> Mapping[str, int]:
        """All reading that could be spared, from which levels take theirs; the dense model has no router."""
        spared = sum(BYTES_DENSE * site.parameters for site in self.sites(structure) if is_swiglu(site))
        return {"router_bytes": 0, "expected_read_bytes": spared}

    def cost(self, site: Site, level: Level) -> Cost:
        if level == _DENSE:
            return {}
        first, last = site.linears[0], site.linears[-1]
        read = _neurons(site, min(self._count(site), last.together * self._chosen(site, level)), self._count(site))
        skipped = BYTES_DENSE * _per_neuron(site) * (last.in_features - read) if is_swiglu(site) else 0
        return {
            "flops_per_token": self._operations(site, level) - self._operations(site, _DENSE),
            "router_bytes": BYTES_DENSE * self._count(site) * (first.in_features + 1),
            **({"expected_read_bytes": -skipped} if skipped else {}),
        }

    def kernel(self, site: Site, level: Level) -> str | None:
        return "moe" if level != _DENSE and is_swiglu(site) else None

    def stored_level(self, site: Site, level: Level) -> Level:
        """Experts and router are the same for all levels."""
        return self.shares[0]

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        """`experts`, int64 [inputs of the last linear], and `router`, float16 [experts, stream + 1], of which the last column is added."""
        assert site.output is not None
        known, weight = material.needed(site.output), material.weights[site.output]
        fed, amounts = known["fed"].double(), known["amounts"].double() * weight.double().norm(dim=0)
        mean = fed[-1, :-1]
        moments = fed[:-1, :-1] - mean.outer(mean)
        moments += _DAMPING * moments.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny) * torch.eye(len(mean))
        root = torch.linalg.cholesky(moments)
        profiles = torch.linalg.solve_triangular(root, amounts[:-1] - mean.outer(amounts[-1]), upper=False)  # [stream, neurons]
        inner = _divided(torch.nn.functional.normalize(profiles, dim=0).T, ceil(profiles.shape[1] / self.neurons))
        members = torch.nn.functional.one_hot(inner).double()  # [neurons, experts]
        slopes = torch.linalg.solve_triangular(root.T, profiles @ members, upper=True)
        router = torch.cat([slopes, (amounts[-1] @ members - mean @ slopes)[None]]).T
        router = router - router.mean(0)  # what is common to all decides nothing
        router = router / router.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        places = material.columns.get(site.output, torch.arange(weight.shape[1]))
        experts = torch.zeros(site.linears[-1].in_features, dtype=torch.int64)
        return {"experts": experts.index_copy_(0, places, inner), "router": router.half()}

    def apply_built(self, model: nn.Module, site: Site, level: Level, built: Mapping[str, Tensor]) -> Undo:
        if level == _DENSE:
            return swap(model, {})
        assert site.output is not None
        device = next(model.parameters()).device
        experts, router = built["experts"].to(device), built["router"].to(device, torch.float32)
        chosen = ceil(round(float(level) * len(router), 9))
        kept: list[Tensor] = []

        def route(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            scores = torch.nn.functional.linear(given[0].float(), router[:, :-1], router[:, -1])
            sent = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(chosen, -1).indices, True)
            kept.append(sent[..., experts])

        def leave(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (given[0] * kept.pop(), *given[1:])

        first = model.get_submodule(site.linears[0].name).register_forward_pre_hook(route)
        last = model.get_submodule(site.output).register_forward_pre_hook(leave)

        def undo() -> None:
            first.remove()
            last.remove()

        return undo

    def _count(self, site: Site) -> int:
        """Experts of an FFN as it is left."""
        return ceil(site.linears[-1].in_features / self.neurons)

    def _chosen(self, site: Site, level: Level) -> int:
        return ceil(round(float(level) * self._count(site), 9))

    def _operations(self, site: Site, level: Level) -> int:
        """For a token, at the most: experts differ by a neuron where they cannot be equal."""
        first, count = site.linears[0], self._count(site)
        routed = 0 if level == _DENSE else count * (first.in_features + 1)
        return int(2 * first.passes * (_per_neuron(site) * _neurons(site, self._chosen(site, level), count) + routed))


def _per_neuron(site: Site) -> int:
    """Weights of a neuron: its rows in the first linears and its column in the last one."""
    return sum(linear.in_features * linear.out_features for linear in site.linears) // site.linears[-1].in_features


def _neurons(site: Site, experts: int, count: int) -> int:
    """In so many of `count` experts, at the most."""
    inner = site.linears[-1].in_features
    return min(inner, experts * ceil(inner / count))


def _divided(profiles: Tensor, count: int) -> Tensor:
    """Which of `count` parts each row [rows, features] is in, int64 [rows]; sizes differ by one at the most."""
    part = torch.zeros(len(profiles), dtype=torch.int64)

    def halve(rows: Tensor, first: int, count: int) -> None:
        if count == 1:
            part[rows] = first
            return
        centred = profiles[rows] - profiles[rows].mean(0)
        direction = centred[int(centred.square().sum(1).argmax())]
        for _ in range(_ROUNDS):
            direction = torch.nn.functional.normalize(centred.T @ (centred @ direction), dim=0)
        order = rows[(centred @ direction).argsort(stable=True)]
        half = count // 2
        cut = len(rows) * half // count
        halve(order[:cut], first, half)
        halve(order[cut:], first + half, count - half)

    halve(torch.arange(len(profiles)), 0, count)
    return part
