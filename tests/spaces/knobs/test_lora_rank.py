"""Ranks of adapters: what they cost, and which settings are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autoeff.errors import InputError
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import make_knob
from autoeff.spaces.sites import Structure
from autoeff.spaces.space import SpaceSpec


def test_parameters_and_bytes_are_those_of_the_factors(make_structure: Callable[..., Structure]) -> None:
    structure = make_structure(2)
    space, _ = build_space(structure, SpaceSpec({"lora_rank": {"ranks": (8, 4, 1, 0)}, "bits": {"group_size": 8}}))
    costs = CostModel(space, batch=2, context=10)
    plain = CostModel(build_space(structure, SpaceSpec({"bits": {"group_size": 8}}))[0], batch=2, context=10)
    indices, counted = [0] * len(space.decisions), 0
    linears = {site.name: site.linears for site in structure.sites}
    for i, decision in enumerate(space.decisions):
        if decision.knob == "lora_rank":
            indices[i] = i % 4
            rank = int(decision.levels[indices[i]])
            counted += sum(rank * (linear.in_features + linear.out_features) for linear in linears[decision.site])
    assert costs.exact("trainable_parameters", indices) == counted
    assert costs.exact("weight_bytes", indices) == plain.dense("weight_bytes") + 2 * counted
    assert costs.exact("bytes_per_token", indices) == plain.dense("bytes_per_token") + counted
    assert costs.exact("linear_bytes", indices) == plain.dense("linear_bytes")
    assert "trainable_parameters" not in plain.measures


def test_linears_that_are_not_decided_about_have_no_adapter(make_structure: Callable[..., Structure]) -> None:
    structure = make_structure(2)
    space, _ = build_space(structure, SpaceSpec({"lora_rank": {}}, include=("*0*",)))
    first = {decision.site for decision in space.decisions}
    assert 0 < len(first) < len([site for site in structure.sites if site.kind == "linears"])
    linears = [linear for site in structure.sites if site.name in first for linear in site.linears]
    assert space.dense["trainable_parameters"] == 16 * sum(linear.in_features + linear.out_features for linear in linears)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": (0, 2, 4)}, "lora_rank.ranks must fall to 0 or above, two at least: got 0, 2, 4"),
        ({"ranks": (4,)}, "lora_rank.ranks must fall to 0 or above, two at least: got 4"),
        ({"ranks": (4, -1)}, "lora_rank.ranks must fall to 0 or above"),
        ({"optimizer": "lion"}, "lora_rank.optimizer must be one of adamw, adam, sgd: got 'lion'"),
        ({"tokens": 0}, "lora_rank.tokens must be at least 1: got 0"),
        ({"batch": 0}, "lora_rank.batch must be at least 1: got 0"),
        ({"learning_rate": 0.0}, r"lora_rank.learning_rate must be above 0: got 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_knob("lora_rank", settings)


@pytest.mark.parametrize("other", ["heads", "rank", "skip", "width"])
def test_nothing_that_changes_shapes_is_searched_beside_it(make_structure: Callable[..., Structure], other: str) -> None:
    with pytest.raises(InputError, match=f"knob lora_rank cannot be searched together with {other}"):
        build_space(make_structure(2), SpaceSpec({"lora_rank": {}, other: {}}))
