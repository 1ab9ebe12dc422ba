from __future__ import annotations

import torch

from autoeff.spaces.criterion import Pattern, make_criterion


def test_the_greatest_magnitudes_of_a_row_stay() -> None:
    weight = torch.randn(7, 41, generator=torch.Generator().manual_seed(0))
    found = make_criterion("magnitude").prune(weight, Pattern(13))
    for row, mask in zip(weight.abs().tolist(), found.mask.tolist(), strict=True):
        assert sorted(w for w, kept in zip(row, mask, strict=True) if kept) == sorted(row)[-13:]
    assert torch.equal(found.weight, torch.where(found.mask, weight, 0.0))
