"""NIRVANA against what weights and units are worth to a function that is linear in each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from autoeff.spaces.criterion import Pattern, make_criterion
from autoeff.spaces.knob import make_knob
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Coupling, Linear, Site


def test_what_goes_moves_a_linear_function_least() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(5, 12, generator=generator), torch.randn(5, 12, generator=generator)
    found = make_criterion("nirvana").prune(weight, Pattern(7), {"gradient": gradient})
    for row in range(5):
        moved = []
        for j in range(12):
            without = weight.double().clone()
            without[row, j] = 0
            moved.append(abs(float(((weight.double() - without) * gradient.double()).sum())))
        assert set(found.mask[row].nonzero()[:, 0].tolist()) == set(sorted(range(12), key=moved.__getitem__)[5:])


def test_a_unit_is_worth_the_sum_over_its_rows_and_columns() -> None:
    generator = torch.Generator().manual_seed(1)
    up, down = Linear("up", 6, 16, False), Linear("down", 16, 6, False)
    places = torch.arange(16)[:, None]
    site = Site("ffn", "ffn", 0, (up, down), "down", coupling=Coupling(16, {"up": places}, {"down": places}))
    weights = {linear.name: torch.randn(linear.out_features, linear.in_features, generator=generator).half() for linear in (up, down)}
    slopes = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    material = Material(weights, statistics={f"{name}.gradient": slope for name, slope in slopes.items()})
    knob = make_knob("width", {"criterion": "nirvana", "multiple": 1})

    def saliency(name: str) -> Tensor:
        return (weights[name].double() * slopes[name].double()).abs()

    worth = saliency("up").sum(1) + saliency("down").sum(0)
    for share, kept in ((0.75, 12), (0.25, 4)):
        assert knob.build(site, share, material)["units"].tolist() == sorted(worth.argsort(descending=True)[:kept].tolist())
