"""Distance of a candidate from the dense model, and the scores that confirm it.

Decoders: the mean KL divergence from the dense next-token distribution. With a linear head (logits = W h + b) and teacher
probabilities p,

    KL(p || q) = sum_v p_v (log p_v - log q_v) = f(h_dense) - f(h),   f(h) = e . h + p . b - logsumexp(W h + b),   e = W^T p

so a teacher token is one vector `e` of the hidden width and one number: neither logits nor a second head product are ever
needed again, and a candidate with the dense hidden states has a KL of exactly zero. Logits exist for some tokens and some rows of
the head at a time; the normaliser runs along the rows (as in online softmax, arXiv:1805.02867).
Encoders: one minus the cosine to the dense sentence embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoeff.errors import CandidateError, FailureClass

__all__ = [
    "CHUNK_LOGITS",
    "CHUNK_ROWS",
    "Sample",
    "Teacher",
    "cosine_damage",
    "log_normalisers",
    "next_token_losses",
    "pooled",
    "sample_of",
    "teacher_of",
    "token_kl",
]

CHUNK_LOGITS = 1 << 24
"""64 MiB of float32 logits at a time."""
CHUNK_ROWS = 1 << 14
"""Rows of the head that are widened to float32 at a time; 128 MiB at a hidden size of 2048."""


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
    flat = hidden.float().flatten(0, 1)
    expected = torch.zeros_like(flat)
    expected_bias = torch.zeros(len(flat), device=flat.device) if head.bias is not None else None
    log_sum = flat.new_full((len(flat),), -torch.inf)
    for weight, bias in _rows_of(head):
        for tokens in _chunks(len(flat), len(weight)):
            logits = nn.functional.linear(flat[tokens], weight, bias)
            before = log_sum[tokens]
            after = torch.logaddexp(before, torch.logsumexp(logits, dim=-1))
            shrink = (before - after).exp_()
            p = logits.sub_(after[:, None]).exp_()  # less than its part of the final p by what is still to come
            expected[tokens] = expected[tokens].mul_(shrink[:, None]).addmm_(p, weight)
            if bias is not None and expected_bias is not None:
                expected_bias[tokens] = expected_bias[tokens] * shrink + p @ bias
            log_sum[tokens] = after
    shape = hidden.shape[:2]
    teacher = Teacher(expected.view(hidden.shape), None if expected_bias is None else expected_bias.view(shape), torch.zeros(shape))
    return Teacher(teacher.expected, teacher.bias, _score(hidden, log_sum.view(shape), teacher))


def log_normalisers(hidden: Tensor, head: nn.Linear) -> Tensor:
    """logsumexp(W h + b) of every token, float32 [windows, tokens], of final hidden states [windows, tokens, hidden]."""
    flat = hidden.float().flatten(0, 1)
    log_sum = flat.new_full((len(flat),), -torch.inf)
    for weight, bias in _rows_of(head):
        for tokens in _chunks(len(flat), len(weight)):
            logits = nn.functional.linear(flat[tokens], weight, bias)
            log_sum[tokens] = torch.logaddexp(log_sum[tokens], torch.logsumexp(logits, dim=-1))
    return log_sum.view(hidden.shape[:2])


def token_kl(hidden: Tensor, log_sum: Tensor, teacher: Teacher) -> Tensor:
    """KL in nats of every token, float32 [windows, tokens].

    Args:
        hidden: Candidate's final hidden states, of the same shape as the teacher's.
        log_sum: Their `log_normalisers`.
        teacher: The dense model's.
    """
    return teacher.score - _score(hidden, log_sum, teacher)


def next_token_losses(hidden: Tensor, head: nn.Linear, log_sum: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each window's targets, float32 [windows, tokens - 1].

    Args:
        hidden: Final hidden states [windows, tokens, hidden].
        head: Output head.
        log_sum: The `log_normalisers` of `hidden`.
        ids: The windows, int64 [windows, tokens].
    """
    targets = ids[:, 1:]
    logits = (hidden[:, :-1].float() * head.weight[targets].float()).sum(-1)
    if head.bias is not None:
        logits += head.bias[targets].float()
    return log_sum[:, :-1] - logits


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings: mean over the attention mask, unit length, float32 [sentences, hidden]."""
    weights = mask.unsqueeze(-1).float()
    mean = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    return nn.functional.normalize(mean, dim=-1)


def cosine_damage(embeddings: Tensor, dense: Tensor) -> Tensor:
    """1 - cosine of unit vectors, [sentences]; half the squared distance, so that equal vectors give exactly zero."""
    return (embeddings - dense).square().sum(-1) / 2


def _score(hidden: Tensor, log_sum: Tensor, teacher: Teacher) -> Tensor:
    score = (hidden.float() * teacher.expected).sum(-1)
    return (score if teacher.bias is None else score + teacher.bias) - log_sum


def _rows_of(head: nn.Linear) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The head's weight and bias in float32, some rows at a time."""
    for start in range(0, len(head.weight), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        yield head.weight[rows].float(), None if head.bias is None else head.bias[rows].float()


def _chunks(tokens: int, rows: int) -> Sequence[slice]:
    step = max(1, CHUNK_LOGITS // rows)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
