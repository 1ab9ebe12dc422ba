"""Attention over a prompt that looks at chosen blocks of keys: what levels of `attention_sparsity` put in force.

The prompt is cut into blocks. A block of queries is compared with the blocks of keys before it by their mean vectors; a softmax over these
says how much attention each block is likely to get. Its own block and that of the first token are always seen, of the others the fewest
with which the share reaches the wanted mass. Tokens that are generated see everything.

Source: block selection after PBS-Attn, arXiv:2510.21270, without its permutation of tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoeff.errors import InputError
from autoeff.spaces.knob import Undo
from autoeff.spaces.kv_cache import seen_by, sees_all, wide

__all__ = ["block_size", "chosen_blocks", "look_at_blocks", "most_pairs"]

_NAME = "autoeff_blocks"  # of the attention function, as transformers knows it


def block_size(most: int, tokens: int) -> int:
    """Tokens of a block of a prompt of so many: at most a 32nd of it, a power of two."""
    return min(most, 1 << max(0, (tokens // 32).bit_length() - 1))


def most_pairs(tokens: int, block: int, mass: float) -> int:
    """Pairs of tokens that see each other, at the most: of n blocks the two that are always seen may hold no mass at all."""
    pairs = 0
    for start in range(0, tokens, block):
        own, before = min(block, tokens - start), start // block  # tokens of this block of queries, blocks before it
        seen = before + 1 if mass == 1 else min(before + 1, -int(-mass * (before - 1) // 1) + 2)
        pairs += own * (own + 1) // 2 + (seen - 1) * own * block
    return pairs


def chosen_blocks(query: Tensor, key: Tensor, scale: float, mass: float, block: int) -> Tensor:
    """Which blocks of keys each block of queries sees, bool [B, heads, blocks, blocks].

    Args:
        query: [B, heads, T, D].
        key: [B, KV heads, T, D].
        scale: Of the products.
        mass: Share of the attention that is wanted, below 1.
        block: Tokens of a block.
    """
    keys = _means(wide(key), block).repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = _means(wide(query), block) @ keys.transpose(2, 3) * scale
    blocks = logits.shape[2]
    visible = torch.ones(blocks, blocks, dtype=torch.bool, device=logits.device).tril_()
    shares = logits.masked_fill(~visible, -torch.inf).softmax(3)
    always = torch.eye(blocks, dtype=torch.bool, device=logits.device)
    always[:, 0] = True
    order = (shares + 2 * always).argsort(dim=3, descending=True, stable=True)
    ranked = shares.gather(3, order)
    wanted = ranked.cumsum(3) - ranked < mass  # what stands before does not reach it
    return (torch.zeros_like(wanted).scatter_(3, order, wanted) | always) & visible


def look_at_blocks(model: nn.Module, attention: str, mass: float, block: int) -> Undo:
    """Lets one attention of a decoder see chosen blocks of a prompt.

    Args:
        model: A transformers model whose attention goes through `ALL_ATTENTION_FUNCTIONS`.
        attention: Module path.
        mass: Share of the attention that is wanted, below 1.
        block: Tokens of a block of long prompts, see `block_size`.
    """
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    module: Any = model.get_submodule(attention)
    before, config = module.config, copy.copy(module.config)
    vars(config)["_attn_implementation_internal"] = _NAME
    module.config = config
    vars(module)["block_attention"] = mass, block

    def undo() -> None:
        module.config = before
        del vars(module)["block_attention"]

    return undo


def _means(tensor: Tensor, block: int) -> Tensor:
    """Mean vectors of blocks of tokens, [B, heads, blocks, D]; the last block may be shorter."""
    tokens = tensor.shape[2]
    blocks = -(-tokens // block)
    whole = pad(tensor, (0, 0, 0, blocks * block - tokens))
    sums: Tensor = whole.view(*tensor.shape[:2], blocks, block, -1).sum(3)
    sizes = torch.full((blocks, 1), float(block), device=tensor.device)
    sizes[-1] = tokens - (blocks - 1) * block
    return sums / sizes.to(tensor.dtype)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: [B, T, heads, D]."""
    mass, most = vars(module)["block_attention"]
    tokens, arriving, softcap = key.shape[2], query.shape[2], kwargs.get("softcap")
    if attention_mask is not None and arriving > 1 and not sees_all(attention_mask):
        raise InputError("attention over chosen blocks takes prompts of one length; run prompts of different lengths one by one")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if arriving != tokens:  # text that is generated behind a prompt
        weights = seen_by(query, key, scale, softcap, tokens - arriving).flatten(2, 3)
        return (weights.to(value.dtype) @ value).view(*query.shape[:3], -1).transpose(1, 2).contiguous(), None
    block = block_size(most, tokens)
    seen = chosen_blocks(query, key, scale, mass, block).repeat_interleave(block, 2).repeat_interleave(block, 3)
    seen = seen[:, :, :tokens, :tokens].tril()
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=True).transpose(1, 2).contiguous(), None
    keys, values = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    logits = torch.tanh(wide(query) @ wide(keys).transpose(2, 3) * (scale / softcap)) * softcap
    return (logits.masked_fill(~seen, -torch.inf).softmax(3).to(values.dtype) @ values).transpose(1, 2).contiguous(), None
