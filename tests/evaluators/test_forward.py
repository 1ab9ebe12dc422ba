"""Entering a model midway gives bit for bit what a whole pass gives."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from autoeff.evaluators.forward import Forward, fed_to, state_bytes, state_stride
from autoeff.spaces.sites import find_structure

MakeModel = Callable[..., nn.Module]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pass_that_reuses_a_prefix_is_bit_exact(every_family: str, tiny_model: MakeModel, stride: int) -> None:
    model = tiny_model(every_family)
    structure = find_structure(model)
    forward = Forward(model, structure.blocks, stride)
    ids = torch.randint(0, 61, (6, 11))
    mask = torch.ones_like(ids) if every_family in ("bert", "roberta") else None
    if mask is not None:
        mask[2:, 7:] = 0
    rng = random.Random(0)
    for rows in forward.batches(len(ids), ids.numel()):
        dense, states = forward.run(ids, mask, rows, [], [])
        for changed in range(3):
            weight = model.get_parameter(rng.choice([m.weight for s in structure.sites if s.block == changed for m in s.linears]))
            original = weight.data
            weight.data = original * 1.5
            whole, _ = forward.run(ids, mask, rows, [], [])
            reused, again = forward.run(ids, mask, rows, [states], [changed])
            weight.data = original
            assert torch.equal(whole, reused)
            assert not torch.equal(whole, dense)
            assert again.keys() == states.keys() == set(range(stride, 3, stride))
            assert all(torch.equal(again[block], states[block]) for block in states if block <= changed)


def test_only_the_blocks_after_the_first_change_are_computed(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    forward = Forward(model, find_structure(model).blocks, stride=1)
    ids = torch.randint(0, 61, (4, 8))
    _, states = forward.run(ids, None, slice(0, 1), [], [])
    forward.computed_blocks = 0
    forward.run(ids, None, slice(0, 1), [states, None], [2, 0])
    assert forward.computed_blocks == 1


def test_the_stride_is_the_least_whose_states_fit() -> None:
    one = state_bytes(1, tokens=10, hidden_size=4)
    assert one == 2 * 10 * 4 * 4
    found = {kept: state_stride(16, 10, 4, kept * one) for kept in (100, 15, 14, 7, 5, 1, 0)}
    assert found == {100: 1, 15: 1, 14: 2, 7: 2, 5: 3, 1: 8, 0: None}
    assert all(stride is None or (16 - 1) // stride <= kept for kept, stride in found.items())


def test_nothing_is_kept_where_reuse_is_off(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    forward = Forward(model, find_structure(model).blocks, stride=None)
    assert forward.run(torch.zeros(4, 8, dtype=torch.long), None, slice(0, 1), [], [])[1] == {}


def test_a_pass_beside_run_keeps_nothing(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    forward = Forward(model, find_structure(model).blocks, stride=1)
    forward.body(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert forward._seen is None


def test_images_are_fed_in_the_dtype_that_a_gpu_computes_in() -> None:
    model, images, ids = nn.Linear(4, 4).half(), torch.ones(2, 4), torch.ones(2, 4, dtype=torch.int64)
    assert fed_to(model, images) is images  # a CPU keeps some parameters in 16 bits and computes in float32
    there = model.to("meta")
    assert fed_to(there, images.to("meta")).dtype == torch.float16
    assert fed_to(there, ids.to("meta")).dtype == torch.int64
