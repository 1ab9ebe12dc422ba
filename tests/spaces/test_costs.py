"""Costs against bytes and operations counted one by one on packed tensors and modules."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
from torch import Tensor, nn

from autoeff.spaces.build import build_space
from autoeff.spaces.configuration import Configuration
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import Knob
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Structure, find_structure
from autoeff.spaces.space import SearchSpace, SpaceSpec

BATCH, CONTEXT = 3, 50


def _counted(
    model: nn.Module, structure: Structure, knobs: dict[str, Knob], weights: dict[str, Tensor], configuration: Configuration
) -> dict[str, float]:
    """Every cost measure, by looking at what is stored and run."""
    skipped = {
        linear.name
        for site in structure.sites
        if configuration.levels.get(f"{site.name}:skip") == "skip"
        for linear in site.linears
    }  # fmt: skip
    linear_bytes = flops = kv = 0
    for site in structure.sites:
        if site.kind == "linears" and site.linears[0].name not in skipped:
            bits = configuration.levels[f"{site.name}:bits"]
            parts = (
                knobs["bits"].build(site, bits, Material(weights).of(_names(site)))
                if bits != 16
                else {name: weights[name] for name in _names(site)}
            )
            linear_bytes += sum(tensor.nbytes for tensor in parts.values())
            flops += sum(2 * weights[name].numel() for name in _names(site))
        if site.kind == "attention" and site.linears[0].name not in skipped and model.config.model_type != "bert":
            heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
            kv += 2 * 2 * heads * getattr(model.config, "head_dim", model.config.hidden_size // model.config.num_attention_heads)
    head = model.get_output_embeddings()
    stored = {id(p): p.numel() for p in model.parameters()}
    other = 2 * (sum(stored.values()) - sum(weight.numel() for weight in weights.values()))
    looked_up = 2 * sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    )
    return {
        "linear_bytes": linear_bytes,
        "weight_bytes": linear_bytes + other,
        "avg_bits": linear_bytes * 8 / sum(weight.numel() for weight in weights.values()),
        "kv_bytes": BATCH * CONTEXT * kv,
        "bytes_per_token": (linear_bytes + other - looked_up) / BATCH + CONTEXT * kv,
        "flops_per_token": flops + (0 if head is None else 2 * head.weight.numel()),
    }


def _names(site: object) -> list[str]:
    return [linear.name for linear in site.linears]


def _weights(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    weights = {linear.name: model.get_submodule(linear.name).weight.detach().half() for linear in structure.linears}
    return {linear.name: weights[linear.name].T if linear.transposed else weights[linear.name] for linear in structure.linears}


@pytest.mark.parametrize("settings", [{}, {"group_size": 8, "symmetric": True}, {"group_size": 24}])
@pytest.mark.parametrize("untie", [False, True])
def test_costs_equal_what_is_counted(family: str, tiny_model: Callable[..., nn.Module], settings: dict[str, object], untie: bool) -> None:
    model = tiny_model(family)
    structure = find_structure(model, untie=untie)
    space, knobs = build_space(structure, SpaceSpec({"bits": settings, "skip": {}}))
    costs = CostModel(space, batch=BATCH, context=CONTEXT)
    weights = _weights(model, structure)
    rng = random.Random(family)
    for indices in ((0,) * len(space.decisions), *(space.sample(rng) for _ in range(4))):
        assert costs.values(indices) == pytest.approx(_counted(model, structure, knobs, weights, space.at(indices)), rel=1e-15)


def test_limit_on_bytes_is_exact_arithmetic(make_structure: Callable[..., Structure]) -> None:
    space, _ = build_space(make_structure(1), SpaceSpec({"bits": {}}))
    costs = CostModel(space, batch=3, context=7)
    assert costs.exact("avg_bits", [1] * 4) == Fraction(17, 2)  # 8 bits and 32 bits of scale and minimum per 64 weights
    assert costs.exact("bytes_per_token", [0] * 4) == Fraction(2 * (6 * 64 * 64 + 1000 - 300), 3) + 7 * 4 * 64
    assert costs.dense("linear_bytes") == 2 * 6 * 64 * 64


def test_change_of_a_decision_adds_up(make_structure: Callable[..., Structure]) -> None:
    space, _ = build_space(make_structure(2), SpaceSpec({"bits": {}, "skip": {}}))
    costs = CostModel(space, batch=2, context=9)
    indices = space.sample(random.Random(1))
    contexts = space.contexts(indices)
    for name, form in costs.measures.items():
        changes = [form.change(d.costs[c][i]) for d, i, c in zip(space.decisions, indices, contexts, strict=True) if c is not None]
        assert costs.exact(name, indices) == costs.dense(name) + sum(changes)


def test_space_alone_is_enough_for_the_costs(make_structure: Callable[..., Structure]) -> None:
    space, _ = build_space(make_structure(2), SpaceSpec({"bits": {}, "skip": {}}))
    again = SearchSpace.from_yaml(space.to_yaml())
    indices = space.sample(random.Random(2))
    assert CostModel(again, batch=1, context=1).values(indices) == CostModel(space, batch=1, context=1).values(indices)


def test_spaces_from_before_latency_read_what_they_store(tiny_model: Callable[..., nn.Module]) -> None:
    structure = find_structure(tiny_model("llama"))
    space, _ = build_space(structure, SpaceSpec({"bits": {}}))
    before = SearchSpace(
        tuple(
            replace(d, costs={c: tuple({n: v for n, v in cost.items() if n != "read_bytes"} for cost in row) for c, row in d.costs.items()})
            for d in space.decisions
        ),
        {name: value for name, value in space.dense.items() if name != "read_bytes"},
    )
    for seed in range(5):
        indices = space.sample(random.Random(seed))
        assert CostModel(before, batch=1, context=2).values(indices) == CostModel(space, batch=1, context=2).values(indices)


@pytest.mark.parametrize(("quantity", "method"), [("decode_ns", "predicted"), ("decode_floor_ns", "estimated")])
def test_times_say_how_they_came_about(tiny_model: Callable[..., nn.Module], quantity: str, method: str) -> None:
    space, _ = build_space(find_structure(tiny_model("llama")), SpaceSpec({"bits": {}}), dense={quantity: 1_500_000})
    found = {m.name: (m.value, m.method) for m in CostModel(space, batch=1, context=2).measurements([0] * len(space.decisions))}
    assert found.pop("decode_ms") == (1.5, method)
    assert {how for _, how in found.values()} == {"exact"}
