"""What the weights of the dense model say without a candidate: what rules that share out sparsity among the layers go by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Magnitudes", "magnitudes_of", "outlier_share", "tail_exponent"]

_STEPS = 1000  # quantiles kept, so a global threshold is met within a thousandth of every layer


@dataclass(frozen=True)
class Magnitudes:
    """The absolute values of some weights.

    Attributes:
        weights: How many.
        quantiles: The k / 1000 quantiles, k from 0 to 1000.
        pq_index: 0 where all are equal, towards 1 where few hold everything (PQ Index, arXiv:2302.05601; p = 0.5, q = 1).
    """

    weights: int
    quantiles: tuple[float, ...]
    pq_index: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Magnitudes:
        return cls(value["weights"], tuple(value["quantiles"]), value["pq_index"])


def magnitudes_of(weights: Iterable[Tensor]) -> Magnitudes:
    """Of all elements of float tensors of any shapes."""
    ordered = torch.cat([weight.detach().float().abs().flatten() for weight in weights]).sort().values
    count = len(ordered)
    places = (torch.linspace(0, 1, _STEPS + 1, dtype=torch.float64, device=ordered.device) * (count - 1)).round().long()
    total = ordered.sum(dtype=torch.float64)
    index = 0.0 if total == 0 else float(1 - ordered.sqrt().sum(dtype=torch.float64).square() / total / count)
    return Magnitudes(count, tuple(ordered[places].tolist()), index)


def outlier_share(weights: Sequence[Tensor], norms: Sequence[Tensor], times: float) -> float:
    """The share of Wanda scores |w| times input norm that exceed `times` their mean, over some linears together (OWL, arXiv:2310.05175).

    Args:
        weights: Each [N, K].
        norms: Euclidean norms of their inputs, each [K].
        times: M of the paper.
    """
    scores = [weight.detach().float().abs() * norm.to(weight.device) for weight, norm in zip(weights, norms, strict=True)]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > times * mean).sum()) for score in scores) / count


def tail_exponent(weight: Tensor) -> float:
    """Hill's estimate of the exponent of the upper half of the eigenvalues of W^T W: small for a heavy tail, that is a well trained matrix.

    Args:
        weight: [N, K], or [E, N, K], of which the mean is taken.

    Source: AlphaPruning, arXiv:2410.10912.
    """
    eigenvalues = torch.linalg.svdvals(weight.detach().float()).double().square().flip(-1)  # rising
    least = torch.finfo(torch.float32).tiny
    upper = eigenvalues[..., eigenvalues.shape[-1] // 2 :].clamp_min(least)
    logarithms = torch.log(upper / upper[..., :1]).sum(-1).clamp_min(least)
    return float((1 + upper.shape[-1] / logarithms).mean())
