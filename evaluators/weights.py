"""What the weights of the dense model say without a candidate: what rules that share out sparsity among the layers go by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from autoeff.evaluators.model_statistics import Magnitudes

__all__ = ["magnitudes_of", "outlier_share", "tail_exponent"]

_STEPS = 1000  # quantiles kept, so a global threshold is met within a thousandth of every layer


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
