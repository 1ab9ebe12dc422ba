"""KL, perplexity, cosine and Spearman against float64 definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoeff.errors import CandidateError, FailureClass
from autoeff.evaluators.quality import (
    Teacher,
    cosine_damage,
    log_normalisers,
    next_token_losses,
    pooled,
    sample_of,
    teacher_of,
    token_kl,
)


def head(bias: bool, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(24, 301, bias=bias)


def kl_of(hidden: torch.Tensor, linear: nn.Linear, teacher: Teacher) -> torch.Tensor:
    return token_kl(hidden, log_normalisers(hidden, linear), teacher)


@pytest.mark.parametrize("rows", [301, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 3.0])
def test_token_kl_equals_the_definition_in_float64(bias: bool, distance: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoeff.evaluators.quality.CHUNK_ROWS", rows)
    linear, dense = head(bias), torch.randn(3, 7, 24) * 2
    candidate = dense + distance * torch.randn_like(dense)
    p = torch.log_softmax(linear.double()(dense.double()), -1)
    q = torch.log_softmax(linear(candidate.double()), -1)
    expected = (p.exp() * (p - q)).sum(-1)
    linear.float()
    found = kl_of(candidate, linear, teacher_of(dense, linear))
    # f(h) is of the order of the logits (here below 30), so float32 leaves an absolute error of some 30 x 2^-24 x 10
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [301, 64])
def test_dense_hidden_states_have_a_kl_of_exactly_zero(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoeff.evaluators.quality.CHUNK_ROWS", rows)
    linear, dense = head(True), torch.randn(4, 9, 24)
    assert torch.equal(kl_of(dense.clone(), linear, teacher_of(dense, linear)), torch.zeros(4, 9))


def test_chunks_of_tokens_do_not_change_the_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, dense, candidate = head(False), torch.randn(2, 50, 24), torch.randn(2, 50, 24)
    whole = kl_of(candidate, linear, teacher_of(dense, linear))
    monkeypatch.setattr("autoeff.evaluators.quality.CHUNK_LOGITS", 7 * 301)
    torch.testing.assert_close(kl_of(candidate, linear, teacher_of(dense, linear)), whole, rtol=1e-5, atol=1e-5)


def test_a_head_of_16_bit_is_never_widened_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    widened: list[int] = []
    original = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: widened.append(tensor.numel()) or original(tensor))
    monkeypatch.setattr("autoeff.evaluators.quality.CHUNK_ROWS", 50)
    linear, dense = head(True).bfloat16(), torch.randn(1, 2, 24)
    found = kl_of(dense + 0.1, linear, teacher_of(dense, linear))
    assert max(widened) == 50 * 24
    linear.float()
    assert torch.equal(found, kl_of(dense + 0.1, linear, teacher_of(dense, linear)))


@pytest.mark.parametrize("bias", [False, True])
def test_losses_are_those_of_the_targets_inside_the_window(bias: bool) -> None:
    linear, hidden, ids = head(bias), torch.randn(2, 5, 24), torch.randint(0, 301, (2, 5))
    logits = linear(hidden)
    expected = torch.stack([nn.functional.cross_entropy(logits[i, :-1], ids[i, 1:], reduction="none") for i in range(2)])
    torch.testing.assert_close(next_token_losses(hidden, linear, log_normalisers(hidden, linear), ids), expected)


def test_pooling_ignores_padding_and_has_unit_length() -> None:
    hidden, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = pooled(hidden, mask)
    torch.testing.assert_close(found[0], nn.functional.normalize(hidden[0, :2].mean(0), dim=0))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))


def test_cosine_damage_is_one_minus_cosine_and_zero_for_equal_embeddings() -> None:
    a, b = nn.functional.normalize(torch.randn(2, 6, 16), dim=-1)
    torch.testing.assert_close(cosine_damage(a, b), 1 - (a * b).sum(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(cosine_damage(a, a.clone()), torch.zeros(6))


def test_a_value_that_is_not_finite_is_the_candidates_failure() -> None:
    with pytest.raises(CandidateError, match="not finite") as caught:
        sample_of(torch.tensor([1.0, float("nan")]))
    assert caught.value.failure is FailureClass.NAN


def test_spread_is_the_standard_error_over_windows() -> None:
    found = sample_of(torch.tensor([1.0, 3.0]))
    assert (found.mean, found.spread) == (2.0, pytest.approx(1.0))
