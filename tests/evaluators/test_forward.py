"""Entering a model midway gives bit for bit what a whole pass gives."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from autoeff.evaluators.forward import Forward
from autoeff.spaces.sites import find_structure

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 61}
CONFIGS: list[tuple[PretrainedConfig, type]] = [
    (LlamaConfig(**SMALL, num_key_value_heads=2), AutoModelForCausalLM),
    (Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8), AutoModelForCausalLM),
    (GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0), AutoModelForCausalLM),
    (BertConfig(**SMALL), AutoModel),
]


def tiny(config: PretrainedConfig, kind: type) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind.from_config(config).eval()
    return model


@pytest.mark.parametrize(("config", "kind"), CONFIGS, ids=lambda item: getattr(item, "model_type", ""))
def test_a_pass_that_reuses_a_prefix_is_bit_exact(config: PretrainedConfig, kind: type) -> None:
    model = tiny(config, kind)
    structure = find_structure(model)
    forward = Forward(model, structure.blocks, keep_bytes=1 << 30)
    ids = torch.randint(0, 61, (6, 11))
    mask = torch.ones_like(ids) if config.model_type == "bert" else None
    if mask is not None:
        mask[2:, 7:] = 0
    rng = random.Random(0)
    for rows in forward.batches(ids):
        dense, states = forward.run(ids, mask, rows, [], [])
        for changed in range(4):
            linear = model.get_submodule(rng.choice([m.name for s in structure.sites if s.block == changed for m in s.linears]))
            original = linear.weight.data
            linear.weight.data = original * 1.5
            whole, _ = forward.run(ids, mask, rows, [], [])
            reused, again = forward.run(ids, mask, rows, [states], [changed])
            linear.weight.data = original
            assert torch.equal(whole, reused)
            assert not torch.equal(whole, dense)
            assert all(torch.equal(a, b) for a, b in zip(again[: changed + 1], states, strict=False))


def test_only_the_blocks_after_the_first_change_are_computed() -> None:
    model = tiny(*CONFIGS[0])
    forward = Forward(model, find_structure(model).blocks, keep_bytes=1 << 30)
    ids = torch.randint(0, 61, (4, 8))
    _, states = forward.run(ids, None, slice(0, 1), [], [])
    forward.computed_blocks = 0
    forward.run(ids, None, slice(0, 1), [states, None], [3, 0])
    assert forward.computed_blocks == 1


def test_states_are_not_kept_beyond_the_memory_given() -> None:
    model = tiny(*CONFIGS[0])
    ids = torch.zeros(4, 8, dtype=torch.long)
    needed = 2 * 4 * ids.numel() * 32 * 4
    assert Forward(model, find_structure(model).blocks, keep_bytes=needed).fits(ids, 32)
    assert not Forward(model, find_structure(model).blocks, keep_bytes=needed - 1).fits(ids, 32)
