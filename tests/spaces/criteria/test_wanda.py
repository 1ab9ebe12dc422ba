"""Wanda against its definition and against the errors it stands for."""

from __future__ import annotations

import pytest
import torch

from autoeff.spaces.criterion import Pattern, make_criterion


@pytest.mark.parametrize("pattern", [Pattern(20), Pattern(2, 4)])
def test_inputs_of_equal_norm_give_magnitude(pattern: Pattern) -> None:
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    inputs = torch.eye(64)
    found = make_criterion("wanda").prune(weight, pattern, {"input_norm": inputs.norm(dim=0)})
    expected = make_criterion("magnitude").prune(weight, pattern)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.weight, expected.weight)


def test_what_goes_costs_the_outputs_least_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(5, 12, generator=generator), torch.randn(50, 12, generator=generator) * torch.rand(12, generator=generator)
    found = make_criterion("wanda").prune(weight, Pattern(7), {"input_norm": inputs.norm(dim=0)})
    for row in range(5):
        costs = []
        for j in range(12):
            alone = weight[row].double().clone()
            alone[j] = 0
            costs.append(float((inputs.double() @ (alone - weight[row])).norm()))
        assert set(found.mask[row].nonzero()[:, 0].tolist()) == set(sorted(range(12), key=costs.__getitem__)[5:])


def test_weights_of_an_input_that_was_always_zero_go_first() -> None:
    weight, norm = torch.full((2, 8), 0.1), torch.ones(8)
    weight[:, 3], norm[3] = 100.0, 0.0
    assert not make_criterion("wanda").prune(weight, Pattern(7), {"input_norm": norm}).mask[:, 3].any()
