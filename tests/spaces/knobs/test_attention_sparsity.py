"""Blocks that attention leaves out: the fewest that hold the mass, the same as the kernel, at most as many as they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from autoeff.errors import InputError
from autoeff.kernels import attention_block_sparse as kernel
from autoeff.spaces.block_attention import block_size, chosen_blocks, look_at_blocks, most_pairs
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import make_knob
from autoeff.spaces.sites import find_structure
from autoeff.spaces.space import SpaceSpec

TOKENS = torch.randint(2, 61, (2, 48), generator=torch.Generator().manual_seed(0))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [24, 27])
def test_the_fewest_blocks_that_hold_the_mass_are_seen(tokens: int) -> None:
    """Set by set, from block means in float64."""
    query, key, block, mass = drawn(1, 4, tokens, 8) * 2, drawn(1, 2, tokens, 8, seed=1) * 2, 4, 0.7
    seen = chosen_blocks(query, key, 0.4, mass, block)
    for head in range(4):
        means = [[part.double().mean(0) for part in torch.split(tensor, block)] for tensor in (query[0, head], key[0, head // 2])]
        for row in range(len(means[0])):
            shares = torch.softmax(torch.stack([means[0][row] @ means[1][column] * 0.4 for column in range(row + 1)]), 0)
            always, others = {0, row}, [column for column in range(row + 1) if column not in (0, row)]
            held = [
                always.union(more) for count in range(row + 1) for more in combinations(others, count)
                if sum(float(shares[i]) for i in always.union(more)) >= mass
            ]  # fmt: skip
            found = set(seen[0, head, row].nonzero()[:, 0].tolist())
            assert always <= found <= set(range(row + 1))
            assert len(found) == min(map(len, held))
            assert sum(float(shares[i]) for i in found) >= mass - 1e-6


@torch.no_grad()
def test_layer_gives_what_the_kernel_gives_and_all_blocks_are_dense_attention(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    tokens = torch.randint(2, 61, (1, 1024), generator=torch.Generator().manual_seed(1))
    dense, seen = model(tokens).logits, []
    attention = model.model.layers[1].self_attn
    undo = look_at_blocks(model, "model.layers.1.self_attn", 0.5, 128)
    handle = attention.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    fed: list[Any] = []
    inner = attention.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs), with_kwargs=True)
    changed = model(tokens).logits
    handle.remove()
    inner.remove()
    undo()
    assert not torch.allclose(changed, dense, atol=1e-3)
    assert torch.equal(model(tokens).logits, dense)
    hidden = fed[0]["hidden_states"]
    cos, sin = fed[0]["position_embeddings"]
    query, key, value = (
        proj(hidden).view(1, 1024, -1, 8).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    turned = [tensor * cos + torch.cat([-tensor[..., 4:], tensor[..., :4]], -1) * sin for tensor in (query, key)]
    blocks = kernel.pack(chosen_blocks(*turned, attention.scaling, 0.5, 32), 32)
    assert int(blocks.count.sum()) < 0.9 * 4 * 32 * 33 / 2
    expected = kernel.reference(*turned, value, blocks, attention.scaling)
    torch.testing.assert_close(seen[0].view(1, 1024, 4, 8).transpose(1, 2).double(), expected, rtol=1e-4, atol=1e-5)
    undo = look_at_blocks(model, "model.layers.1.self_attn", 1 - 1e-9, 128)
    torch.testing.assert_close(model(tokens).logits, dense, rtol=1e-4, atol=1e-4)
    undo()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "qwen3_moe"])
def test_text_that_is_generated_sees_everything(tiny_model: Callable[..., Any], family: str) -> None:
    model, knob = tiny_model(family, **({"sliding_window": 32} if family == "gemma2" else {})), make_knob("attention_sparsity", {})
    sites = knob.sites(find_structure(model).at_context(64))
    assert [site.block for site in sites] == ([1] if family == "gemma2" else [0, 1, 2])  # where a window slides it is left as it is
    dense = model(TOKENS)
    site, undo = sites[-1], knob.apply(model, sites[-1], 0.8)
    assert not torch.equal(model(TOKENS).logits, dense.logits)
    cache = DynamicCache(config=model.config)
    undo()
    model(TOKENS[:, :40], past_key_values=cache, use_cache=True)
    again = copy.deepcopy(cache)
    expected = model(TOKENS[:, 40:], past_key_values=cache, use_cache=True).logits
    undo = knob.apply(model, site, 0.8)
    torch.testing.assert_close(model(TOKENS[:, 40:], past_key_values=again, use_cache=True).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="takes prompts of one length"):
        model(TOKENS, attention_mask=torch.tensor([[0] * 8 + [1] * 40, [1] * 48]))
    undo()


@pytest.mark.parametrize("tokens", [64, 100, 1024])
def test_no_text_takes_more_than_a_level_costs(tokens: int) -> None:
    block = block_size(128, tokens)
    assert block == {64: 2, 100: 2, 1024: 32}[tokens]
    assert most_pairs(tokens, block, 1) == tokens * (tokens + 1) // 2
    sizes = torch.tensor([min(block, tokens - start) for start in range(0, tokens, block)])
    pairs = sizes[:, None] * sizes[None, :]
    pairs[range(len(sizes)), range(len(sizes))] = sizes * (sizes + 1) // 2
    for mass in (0.95, 0.8, 0.3):
        most = most_pairs(tokens, block, mass)
        assert most < most_pairs(tokens, block, 1)
        for scale in (0.0, 0.2, 3.0):  # 0: attention is spread evenly, which takes most
            seen = chosen_blocks(drawn(1, 1, tokens, 8), drawn(1, 1, tokens, 8, seed=3), scale, mass, block)
            assert int((seen[0, 0] * pairs).sum()) <= most


def test_costs_are_those_of_attention_over_a_prompt(tiny_model: Callable[..., Any]) -> None:
    structure = find_structure(tiny_model("llama")).at_context(1024)
    space, _ = build_space(structure, SpaceSpec({"attention_sparsity": {}}))
    costs = CostModel(space, batch=1, context=1024)
    assert costs.dense("attention_flops") == 3 * 4 * 4 * 8 * (1024 * 1025 // 2)  # layers, two products of two operations, heads, sizes
    one = space.indices({"model.layers.1.self_attn:attention_sparsity": 0.8})
    assert costs.dense("attention_flops") - costs.exact("attention_flops", one) == 4 * 4 * 8 * (
        1024 * 1025 // 2 - most_pairs(1024, 32, 0.8)
    )
    for name in ("bytes_per_token", "kv_bytes", "weight_bytes", "flops_per_token"):
        assert costs.exact(name, one) == costs.dense(name)


def test_wrong_settings_and_models_are_one_line(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"attention_sparsity\.masses must fall between 1 and 0: got 0\.8, 0\.9"):
        make_knob("attention_sparsity", {"masses": "0.8,0.9"})
    with pytest.raises(InputError, match=r"attention_sparsity\.block must be a power of two, at least 16: got 48"):
        make_knob("attention_sparsity", {"block": "48"})
    with pytest.raises(InputError, match="knob attention_sparsity finds nothing to decide about in this bert model"):
        build_space(find_structure(tiny_model("bert")).at_context(64), SpaceSpec({"attention_sparsity": {}}))
    with pytest.raises(InputError, match="knob attention_sparsity cannot be searched together with kv_budget"):
        build_space(find_structure(tiny_model("llama")).at_context(1024), SpaceSpec({"attention_sparsity": {}, "kv_budget": {}}))
