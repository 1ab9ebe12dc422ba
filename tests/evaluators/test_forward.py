"""Entering a model midway gives bit for bit what a whole pass gives."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from autoeff.evaluators.forward import Forward
from autoeff.spaces.sites import find_structure

MakeModel = Callable[..., nn.Module]


def test_a_pass_that_reuses_a_prefix_is_bit_exact(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    structure = find_structure(model)
    forward = Forward(model, structure.blocks, keep_bytes=1 << 30)
    ids = torch.randint(0, 61, (6, 11))
    mask = torch.ones_like(ids) if every_family in ("bert", "roberta") else None
    if mask is not None:
        mask[2:, 7:] = 0
    rng = random.Random(0)
    for rows in forward.batches(ids):
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
            assert all(torch.equal(a, b) for a, b in zip(again[: changed + 1], states, strict=False))


def test_only_the_blocks_after_the_first_change_are_computed(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    forward = Forward(model, find_structure(model).blocks, keep_bytes=1 << 30)
    ids = torch.randint(0, 61, (4, 8))
    _, states = forward.run(ids, None, slice(0, 1), [], [])
    forward.computed_blocks = 0
    forward.run(ids, None, slice(0, 1), [states, None], [2, 0])
    assert forward.computed_blocks == 1


def test_states_are_not_kept_beyond_the_memory_given(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    ids = torch.zeros(4, 8, dtype=torch.long)
    needed = 2 * 3 * ids.numel() * 32 * 4
    assert Forward(model, find_structure(model).blocks, keep_bytes=needed).fits(ids, 32)
    assert not Forward(model, find_structure(model).blocks, keep_bytes=needed - 1).fits(ids, 32)
