"""Composition of times, against sums over the linears and sublayers that are left."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn

from autoeff.evaluators.latency_costs import GPUS, UNFITTED, Composer, Floors, Operations, further
from autoeff.evaluators.latency_table import Fit, Operation
from autoeff.evaluators.serving import forms
from autoeff.evaluators.setup import LatencySpec
from autoeff.kernels import linear_wq
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import Knob
from autoeff.spaces.sites import Structure, find_structure
from autoeff.spaces.space import SearchSpace, SpaceSpec

CPU = torch.device("cpu")
SPEC = LatencySpec(("decode",), 1, 32, "")
CONSTANTS = {"model": 1000.0, "attention": 70.0, "ffn": 50.0, "linear": 1.0, "packed": 2.0, "attend": 3.0}
KNOBS: Mapping[str, Mapping[str, object]] = {"bits": {"group_size": 32}, "skip": {}, "width": {}, "heads": {}, "sparsity": {}}


def times(operation: Operation) -> int:
    """Made up, another one for every operation."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(operation.key)) % 97 + 1


@pytest.fixture
def structure(tiny_model: Callable[..., nn.Module]) -> Structure:
    model = tiny_model("llama", device="meta")
    return coupled(model, find_structure(model))[0]


def composed(structure: Structure, knobs: Mapping[str, Mapping[str, object]], fit: Fit) -> tuple[SearchSpace, dict[str, Knob], Operations]:
    operations = Operations("decode", SPEC, CPU, torch.float32, 1024, attends=True, causal=True)
    composer = Composer("decode", fit, structure, operations, times)
    space, made = build_space(structure, SpaceSpec(knobs), partial(further, [composer]), {composer.quantity: composer.dense()})
    return space, made, operations


@pytest.mark.parametrize("whole", [(), ("ffn",), ("attention", "ffn")])
def test_every_configuration_takes_the_sum_of_what_is_left(structure: Structure, whole: tuple[str, ...]) -> None:
    space, knobs, operations = composed(structure, KNOBS, Fit(CONSTANTS, whole))
    rng = random.Random(0)
    for _ in range(60):
        indices = space.sample(rng)
        taken = forms(structure, space, knobs, indices)
        expected = 1000
        for form in (form for parts in taken.values() for form in parts):
            operation = operations.linear(form)
            assert operation is not None
            if not form.silenced:
                expected += (1 if operation.name == "linear" else 2) * times(operation)
        for site in structure.sites:
            if site.kind == "linears" or (site.kind in whole and taken[site.linears[0].name][0].silenced):
                continue
            if site.kind == "ffn":
                expected += 50
                continue
            heads = 4 if taken[site.linears[0].name][0].silenced else taken[str(site.output)][0].linear.in_features // 8
            sizes = {"batch": 1, "causal": 1, "context": 32, "heads": heads, "kv": heads // 2, "size": 8}
            expected += 70 + 3 * times(Operation("attention_decode", tuple(sizes.items()), "float32"))
        assert space.primary(indices)["decode_ns"] == expected
        assert CostModel(space, batch=1, context=32).exact("decode_ms", indices) == Fraction(expected, 10**6)


def test_unserved_level_costs_dense_in_time_and_in_bytes_read(structure: Structure) -> None:
    space, _, _ = composed(structure, {"bits": {"group_size": 32}, "sparsity": {}}, Fit(CONSTANTS))
    costs = CostModel(space, batch=1, context=32)
    dense = {name: costs.dense(name) for name in ("decode_ms", "bytes_per_token")}
    pruned = [2 if decision.knob == "sparsity" else 0 for decision in space.decisions]
    coded = [3 if decision.knob == "bits" else 0 for decision in space.decisions]
    both = [max(a, b) for a, b in zip(pruned, coded, strict=True)]
    for indices in (pruned, both):  # no kernel reads a mask, nor codes under one
        assert {name: costs.exact(name, indices) for name in dense} == dense
        assert costs.exact("weight_bytes", indices) < costs.dense("weight_bytes")
    assert all(costs.exact(name, coded) != dense[name] for name in dense)
    read = costs.dense("bytes_per_token") - costs.exact("bytes_per_token", coded)
    assert read == costs.dense("weight_bytes") - costs.exact("weight_bytes", coded)


def test_group_that_a_cpu_kernel_lacks_costs_dense(structure: Structure) -> None:
    space, _, _ = composed(structure, {"bits": {"group_size": 8}}, Fit(CONSTANTS))
    assert {space.primary(space.sample(random.Random(seed)))["decode_ns"] for seed in range(8)} == {space.dense["decode_ns"]}


def test_knob_whose_shapes_do_not_run_costs_dense(structure: Structure) -> None:
    space, _, _ = composed(structure, {"heads": {}, "width": {}}, Fit(CONSTANTS, unserved=("heads",)))
    for i, decision in enumerate(space.decisions):
        cut = [len(decision.levels) - 1 if i == j else 0 for j in range(len(space.decisions))]
        assert (space.primary(cut)["decode_ns"] == space.dense["decode_ns"]) == (decision.knob == "heads")


def test_times_are_rounded_to_a_share_of_the_whole(structure: Structure) -> None:
    operations = Operations("decode", SPEC, CPU, torch.float32, 1024, attends=False, causal=True)
    composer = Composer("decode", UNFITTED, structure, operations, lambda operation: 123_456_789.0)
    space, _ = build_space(structure, SpaceSpec({"bits": {}}), partial(further, [composer]), {"decode_ns": composer.dense()})
    assert space.dense["decode_ns"] == 21 * 123_460_000  # 21 linears: 2.6 s, in steps of 10 us


def test_floors_are_bytes_over_bandwidth_or_operations_over_rate(structure: Structure) -> None:
    gpu = GPUS["H200"]
    site = next(site for site in structure.sites if site.name.endswith("gate_proj+up_proj"))
    for phase, m in (("decode", 2), ("prefill", 2 * 4000)):
        spec = LatencySpec((phase,), 2, 4000, "", "H200")
        operations = Floors(phase, spec, CPU, torch.float16, 0, attends=True, causal=True)
        composer = Composer(phase, UNFITTED, structure, operations, lambda o: o["bytes"] * 10**6, "floor_ns")
        spec_of_space = SpaceSpec({"bits": {"group_size": 32}})
        space, _ = build_space(structure, spec_of_space, partial(further, [composer]), {composer.quantity: 0})
        decision = next(d for d in space.decisions if d.site == site.name)
        dense = 2 * (32 * 40 + m * 72)
        packed = linear_wq.moved_bytes(m, 40, 32, 4, 32, symmetric=False)
        unit = 10 ** (len(str(composer.dense())) - 5)
        change = decision.alone[decision.levels.index(4)][composer.quantity]
        assert change == pytest.approx(2 * (packed - dense) * 10**6, abs=4 * unit)
    attention = next(site for site in structure.sites if site.kind == "attention")
    decode = Floors("decode", LatencySpec(("decode",), 2, 4000, ""), CPU, torch.float16, 0, attends=True, causal=True).attention(attention)
    assert decode is not None
    assert (decode["bytes"], decode["flops"]) == (2 * 4000 * 2 * 2 * 2 * 8, 4 * 2 * 4000 * 32)
    assert gpu.bytes_per_s > 4e12


def test_limits_of_a_search_are_kept_to_the_nanosecond(structure: Structure) -> None:
    from autoeff.search.allocators.dp import solve
    from autoeff.search.limits import check_reachable, least_reachable, parse_limit

    space, _, _ = composed(structure, {"bits": {"group_size": 32}, "skip": {}}, Fit(CONSTANTS, ("attention", "ffn")))
    costs = CostModel(space, batch=1, context=32)
    damage = [[float(level) for level in range(len(decision.levels))] for decision in space.decisions]
    least = least_reachable(costs, "decode_ms")
    for text in ("decode_ms<=0.6x", f"decode_ms<={float(least * 1000):.6f}us", f"decode_ms<={float(least) * 1.3:.9f}ms"):
        limit = parse_limit(text, costs)
        check_reachable([limit], costs)
        found = solve(space, damage, costs, [limit])
        assert found is not None
        assert costs.exact("decode_ms", found) <= limit.bound
