"""The inverse factor against its definition, compensation against least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.hessian import compensated, inverse_factor

CPU = torch.device("cpu")


def _hessian(k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * k, k, generator=generator, dtype=torch.float64) @ torch.randn(k, k, generator=generator, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("k", [1, 2, 7, 63])
def test_factor_is_upper_and_gives_the_inverse_of_the_damped_hessian(k: int) -> None:
    hessian = _hessian(k)
    before = hessian.clone()
    factor = inverse_factor(hessian, CPU).double()
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor.T @ factor @ _damped(hessian, 0.01), torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(hessian, before)


def test_damping_is_raised_tenfold_until_the_factor_exists() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))  # 0.0074 is too little, 0.074 is not
    factor = inverse_factor(hessian, CPU).double()
    torch.testing.assert_close(factor.T @ factor @ _damped(hessian, 0.1), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_hessian_that_no_damping_mends_is_refused() -> None:
    with pytest.raises(InputError, match=r"a hessian \[2, 2\] is not positive definite, even with 10 times its mean diagonal"):
        inverse_factor(torch.tensor([[1.0, 100.0], [100.0, 1.0]]), CPU)
    with pytest.raises(InputError, match=r"a hessian \[2, 2\] holds NaN or infinity"):
        inverse_factor(torch.tensor([[1.0, torch.inf], [torch.inf, 1.0]]), CPU)


def test_nothing_flows_to_or_from_a_dead_input_and_the_others_do_not_notice_it() -> None:
    hessian, alive = _hessian(5), torch.tensor([0, 1, 3, 4])
    hessian[2], hessian[:, 2] = 0, 0
    factor = inverse_factor(hessian, CPU)
    assert (factor[2, 3:] == 0).all()
    assert (factor[:2, 2] == 0).all()
    torch.testing.assert_close(factor[alive][:, alive], inverse_factor(hessian[alive][:, alive], CPU))
    assert inverse_factor(torch.zeros(3, 3), CPU).isfinite().all()


def _refitted(weight: Tensor, fixed: Tensor, hessian: Tensor) -> Tensor:
    """The row nearest in output to `weight` among those that begin with `fixed`: normal equations in float64."""
    j = len(fixed)
    change = fixed - weight[:j]
    rest = -torch.linalg.solve(hessian[j:, j:], hessian[j:, :j] @ change)
    return torch.cat([fixed, weight[j:] + rest])


@pytest.mark.parametrize("block", [1, 2, 3, 5, 128])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_after_every_column_the_rest_is_the_least_squares_optimum(k: int, block: int) -> None:
    hessian = _damped(_hessian(k), 0.01)  # what the factor is of
    weight = torch.randn(4, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    seen: list[Tensor] = []

    def fix(j: int, rest: Tensor) -> Tensor:
        assert rest.shape == (min(block - j % block, k - j), 4)
        seen.append(rest.clone())
        return rest[0].round()

    found = compensated(weight.float(), inverse_factor(_hessian(k), CPU), fix, block)
    for row in range(4):
        fixed: list[float] = []
        for j in range(k):
            expected = _refitted(weight[row], torch.tensor(fixed, dtype=torch.float64), hessian)
            torch.testing.assert_close(seen[j][:, row].double(), expected[j : j + len(seen[j])], rtol=1e-3, atol=1e-3)
            fixed.append(float(seen[j][0, row].round()))
        assert found[row].tolist() == fixed


def test_the_score_of_sparsegpt_is_what_pruning_costs_once_later_columns_made_it_good() -> None:
    k = 6
    factor, hessian = inverse_factor(_hessian(k), CPU).double(), _damped(_hessian(k), 0.01)
    weight = torch.randn(k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for j in range(k):
        best = _refitted(weight, torch.cat([weight[:j], torch.zeros(1, dtype=torch.float64)]), hessian)
        cost = (best - weight) @ hessian @ (best - weight)
        torch.testing.assert_close(cost, (weight[j] / factor[j, j]).square(), rtol=1e-4, atol=1e-8)


def test_the_weight_is_left_alone() -> None:
    weight = torch.randn(3, 4).T  # strided, as an ordered copy may be
    before = weight.clone()
    compensated(weight, inverse_factor(_hessian(3), CPU), lambda j, rest: torch.zeros_like(rest[0]))
    assert torch.equal(weight, before)
    one_row = torch.ones(1, 3)
    compensated(one_row, inverse_factor(_hessian(3), CPU), lambda j, rest: torch.zeros_like(rest[0]))
    assert (one_row == 1).all()
