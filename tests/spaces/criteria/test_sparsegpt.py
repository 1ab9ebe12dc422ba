"""SparseGPT against a brute-force run in float64 and against Wanda."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoeff.spaces.criterion import Pattern, make_criterion


def _inputs(k: int, tokens: int) -> Tensor:
    """Correlated inputs of unequal size, [tokens, K]."""
    generator = torch.Generator().manual_seed(k)
    mixing = torch.randn(8, k, generator=generator) / 8**0.5
    common, own = torch.randn(tokens, 8, generator=generator), torch.randn(tokens, k, generator=generator)
    return (common @ mixing + 0.3 * own) * torch.rand(k, generator=generator).mul(2).exp()


def _weight(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(k + 1))


def _statistics(inputs: Tensor) -> dict[str, Tensor]:
    return {"hessian": inputs.T @ inputs / len(inputs), "input_norm": inputs.norm(dim=0)}


def _lost(inputs: Tensor, change: Tensor) -> float:
    return float((inputs.double() @ change.double().T).square().sum())


def _by_enumeration(row: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """One row, a single block: costs and moves by solving the normal equations, nothing by Cholesky."""
    k = len(row)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(k, dtype=torch.float64)
    current, run = row.double().clone(), pattern.of or k

    def zeroed(weight: Tensor, j: int) -> Tensor:
        change = torch.zeros_like(weight)
        change[j] = -weight[j]
        change[j + 1 :] = -torch.linalg.solve(damped[j + 1 :, j + 1 :], damped[j + 1 :, j] * change[j])
        return change

    pruned: list[int] = []
    for j in range(k):
        if j % run == 0:
            changes = [zeroed(current, i) for i in range(j, j + run)]
            costs = torch.stack([change @ damped @ change for change in changes])
            pruned = (costs.argsort()[: run - pattern.kept] + j).tolist()
        if j in pruned:
            current = current + zeroed(current, j)
    return current


@pytest.mark.parametrize("pattern", [Pattern(0), Pattern(1), Pattern(3), Pattern(5), Pattern(1, 2), Pattern(2, 3)])
def test_tiny_rows_are_those_of_brute_force(pattern: Pattern) -> None:
    inputs, weight = _inputs(6, 40), _weight(8, 6)
    found = make_criterion("sparsegpt").prune(weight, pattern, _statistics(inputs))
    expected = torch.stack([_by_enumeration(row, inputs.T @ inputs / len(inputs), pattern) for row in weight])
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [64, 128, 340])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, "2:4"])
def test_outputs_of_correlated_inputs_lose_less_than_with_wanda(k: int, share: float | str) -> None:
    pattern = Pattern(2, 4) if isinstance(share, str) else Pattern(int(share * k))
    inputs, weight = _inputs(k, 3 * k), _weight(24, k)
    found, wanda = (make_criterion(name).prune(weight, pattern, _statistics(inputs)) for name in ("sparsegpt", "wanda"))
    assert _lost(inputs, found.weight - weight) < 0.7 * _lost(inputs, wanda.weight - weight)


def test_uncorrelated_inputs_leave_what_stays_as_it_was() -> None:
    weight = _weight(6, 128)
    found = make_criterion("sparsegpt").prune(weight, Pattern(50), {"hessian": 3 * torch.eye(128)})
    expected = make_criterion("magnitude").prune(weight, Pattern(50))
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize(("k", "kept"), [(341, 100), (341, 1), (300, 299), (129, 64)])
def test_every_block_keeps_its_share(k: int, kept: int) -> None:
    mask = make_criterion("sparsegpt").prune(_weight(5, k), Pattern(kept), _statistics(_inputs(k, 2 * k))).mask
    for begin in range(0, k, 128):
        end = min(begin + 128, k)
        assert ((mask[:, begin:end].sum(1) - kept * (end - begin) / k).abs() < 1).all()


def test_weights_of_an_input_that_was_always_zero_go_first() -> None:
    inputs, weight = _inputs(64, 200), _weight(4, 64)
    inputs[:, 7] = 0
    weight[:, 7] = 100
    assert not make_criterion("sparsegpt").prune(weight, Pattern(60), _statistics(inputs)).mask[:, 7].any()
    everything = make_criterion("sparsegpt").prune(weight, Pattern(64), _statistics(inputs))
    assert torch.equal(everything.weight, weight)
