"""Distance of a candidate from the dense model, and the scores that confirm it.

Decoders: the mean KL divergence from the dense next-token distribution. With a linear head (logits = W h + b) and teacher
probabilities p,

    KL(p || q) = sum_v p_v (log p_v - log q_v) = f(h_dense) - f(h),   f(h) = e . h + p . b - logsumexp(W h + b),   e = W^T p

so a teacher token is one vector `e` of the hidden width and one number: neither logits nor a second head product are ever
needed again, and a candidate with the dense hidden states has a KL of exactly zero.
Encoders: one minus the cosine to the dense sentence embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoeff.errors import CandidateError, FailureClass

__all__ = ["Sample", "Teacher", "cosine_damage", "next_token_losses", "pooled", "sample_of", "spearman", "teacher_of", "token_kl"]

_CHUNK_LOGITS = 1 << 24  # 64 MiB of float32 logits at a time


@dataclass(frozen=True)
class Sample:
    """Mean over windows with its standard error."""

    mean: float
    spread: float | None


def sample_of(per_window: Tensor) -> Sample:
    """Mean and standard error of `[windows]` values.

    Raises:
        CandidateError: A value is not finite.
    """
    if not bool(torch.isfinite(per_window).all()):
        raise CandidateError(FailureClass.NAN, "the candidate's outputs are not finite")
    values = per_window.double()
    spread = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Sample(float(values.mean()), spread)


@dataclass(frozen=True)
class Teacher:
    """What is kept of the dense model for some windows.

    Attributes:
        expected: e, float32 [windows, tokens, hidden].
        bias: p . b, float32 [windows, tokens]; None where the head has no bias.
        score: f(h_dense), float32 [windows, tokens].
    """

    expected: Tensor
    bias: Tensor | None
    score: Tensor


def teacher_of(hidden: Tensor, head: nn.Linear) -> Teacher:
    """The teacher of dense final hidden states [windows, tokens, hidden]."""
    weight, bias = _head(head)
    flat = hidden.float().flatten(0, 1)
    expected = torch.empty_like(flat)
    expected_bias = torch.empty(len(flat), device=flat.device) if bias is not None else None
    for rows in _chunks(len(flat), len(weight)):
        p = torch.softmax(nn.functional.linear(flat[rows], weight, bias), dim=-1)
        expected[rows] = p @ weight
        if bias is not None and expected_bias is not None:
            expected_bias[rows] = p @ bias
    shape = hidden.shape[:2]
    partial = Teacher(expected.view(hidden.shape), None if expected_bias is None else expected_bias.view(shape), torch.zeros(shape))
    return Teacher(partial.expected, partial.bias, _score(hidden, head, partial))


def token_kl(hidden: Tensor, head: nn.Linear, teacher: Teacher) -> Tensor:
    """KL in nats of every token, float32 [windows, tokens], from candidate hidden states of the same shape as the teacher's."""
    return teacher.score - _score(hidden, head, teacher)


def next_token_losses(hidden: Tensor, head: nn.Linear, ids: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each window's targets, float32 [windows, tokens - 1].

    Args:
        hidden: Final hidden states [windows, tokens, hidden].
        head: Output head.
        ids: The windows, int64 [windows, tokens].
    """
    weight, bias = _head(head)
    flat, targets = hidden[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    losses = torch.empty(len(flat), device=flat.device)
    for rows in _chunks(len(flat), len(weight)):
        losses[rows] = nn.functional.cross_entropy(nn.functional.linear(flat[rows], weight, bias), targets[rows], reduction="none")
    return losses.view(len(ids), -1)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings: mean over the attention mask, unit length, float32 [sentences, hidden]."""
    weights = mask.unsqueeze(-1).float()
    mean = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    return nn.functional.normalize(mean, dim=-1)


def cosine_damage(embeddings: Tensor, dense: Tensor) -> Tensor:
    """1 - cosine of unit vectors, [sentences]; half the squared distance, so that equal vectors give exactly zero."""
    return (embeddings - dense).square().sum(-1) / 2


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties at their mean rank."""
    ranks = torch.stack([_ranks(a.double()), _ranks(b.double())])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    inverse: Tensor
    counts: Tensor
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts - 1) / 2
    return ranks[inverse]


def _score(hidden: Tensor, head: nn.Linear, teacher: Teacher) -> Tensor:
    weight, bias = _head(head)
    flat = hidden.float().flatten(0, 1)
    score = (flat * teacher.expected.flatten(0, 1)).sum(-1)
    if teacher.bias is not None:
        score += teacher.bias.flatten()
    for rows in _chunks(len(flat), len(weight)):
        score[rows] -= torch.logsumexp(nn.functional.linear(flat[rows], weight, bias), dim=-1)
    return score.view(hidden.shape[:2])


def _head(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias = getattr(head, "bias", None)
    return head.weight.float(), None if bias is None else bias.float()


def _chunks(tokens: int, vocabulary: int) -> Sequence[slice]:
    step = max(1, _CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
