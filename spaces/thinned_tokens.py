"""Encoders whose blocks see fewer and fewer tokens: what levels of `token_keep` put in force.

Before a block the tokens that the class token (the first one) attends to least are fused into one, weighted by that attention. It
stands behind those that stay, which keep their order. How many stay follows from the length of a text alone, so that masks of later
blocks are known wherever a pass begins. Padding, always on the right, is never kept.

Source: EViT, arXiv:2202.07800.
"""

from __future__ import annotations

import copy
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoeff.errors import InputError
from autoeff.spaces.blocks import Call, around_block, hidden_of
from autoeff.spaces.knob import Undo
from autoeff.spaces.kv_cache import wide

__all__ = ["remaining", "thin_before"]

_NAME = "autoeff_class"  # of the attention function, as transformers knows it


def thin_before(model: nn.Module, path: str, share: float) -> Undo:
    """Lets at most a share of a text's tokens enter a block: ceil(share (n - 1)) besides the class token and the fused one.

    Raises:
        InputError: The model has no class token, or an attention that cannot be watched.
    """
    if getattr(model, "main_input_name", None) == "pixel_values" and not any(
        name.endswith("cls_token") for name, _ in model.named_parameters()
    ):
        raise InputError(f"cannot understand {type(model).__name__}: it has no class token, whose attention says which tokens stay")
    blocks, _, index = path.rpartition(".")
    plan = vars(model).get("thinned_tokens") or _Plan(model, blocks)
    attention = _attention_of(model, f"{blocks}.{int(index) - 1}")
    plan.shares[int(index)] = share
    config = attention.config
    attention.config = copy.copy(config)
    vars(attention)["class_attention"] = config._attn_implementation
    vars(attention.config)["_attn_implementation_internal"] = _NAME

    def thinned(original: Call) -> Call:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = original(hidden, *args, **kwargs)
            fewer = plan.thinned(hidden_of(result), vars(attention)["class_weights"], int(index))
            return (fewer, *result[1:]) if isinstance(result, tuple) else fewer

        return forward

    undo_block = around_block(model, f"{blocks}.{int(index) - 1}", thinned)

    def undo() -> None:
        undo_block()
        attention.config = config
        for name in ("class_attention", "class_weights"):
            vars(attention).pop(name, None)
        del plan.shares[int(index)]
        plan.rest()

    return undo


def remaining(model: nn.Module, mask: Tensor) -> Tensor:
    """The mask [B, tokens] of what comes out of a model, of the mask of what it was fed with padding on the right."""
    plan: _Plan | None = vars(model).get("thinned_tokens")
    if plan is None:
        return mask
    lengths = plan.lengths(mask.sum(1).long(), max(plan.shares))
    return (torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None]).to(mask.dtype)


class _Plan:
    """Which share of the tokens enters which block, and how long the texts of the batch are."""

    def __init__(self, model: nn.Module, blocks: str) -> None:
        self.shares: dict[int, float] = {}
        self._model = model
        self._whole = torch.zeros(0)
        modules = model.get_submodule(blocks).children()
        self._handles = [block.register_forward_pre_hook(self._before(i), with_kwargs=True) for i, block in enumerate(modules)]
        vars(model)["thinned_tokens"] = self

    def rest(self) -> None:
        """Leaves the model as it was where nothing is in force."""
        if not self.shares:
            for handle in self._handles:
                handle.remove()
            del vars(self._model)["thinned_tokens"]

    def lengths(self, whole: Tensor, block: int) -> Tensor:
        """Tokens of each text that enter a block, int64 [B], of `whole` ones."""
        lengths = whole.clone()
        for share in (self.shares[i] for i in sorted(self.shares) if i <= block):
            kept = torch.tensor([ceil(round(share * (n - 1), 9)) + 2 for n in whole.tolist()], device=whole.device)
            lengths = torch.minimum(lengths, kept)
        return lengths

    def thinned(self, hidden: Tensor, weights: Tensor, block: int) -> Tensor:
        """What enters a block, [B, tokens, H], of what has left the one before; `weights` [B, tokens] are the class token's."""
        before, after = self.lengths(self._whole, block - 1), self.lengths(self._whole, block)
        rows = hidden.new_zeros(len(hidden), int(after.max()), hidden.shape[2])
        for row, text, weight, n, kept in zip(rows, hidden, weights, before.tolist(), after.tolist(), strict=True):
            if kept == n:
                row[:n] = text[:n]
                continue
            order = weight[1:n].argsort(descending=True, stable=True) + 1
            stays, fused = order[: kept - 2].sort().values, order[kept - 2 :]
            row[0], row[1 : kept - 1] = text[0], text[stays]
            row[kept - 1] = (weight[fused] / weight[fused].sum().clamp_min(1e-12)).to(text.dtype) @ text[fused]
        return rows

    def _before(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            hidden = args[0] if args else kwargs["hidden_states"]
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            if index == 0:
                self._whole = torch.full((len(hidden),), hidden.shape[1], device=hidden.device) if mask is None else _seen_keys(mask)
            if mask is None or not any(i <= index for i in self.shares):
                return None
            lengths = self.lengths(self._whole, index)
            seen = torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None]
            seen = seen[:, None, None].expand(-1, 1, seen.shape[1], -1)
            if mask.dtype != torch.bool:
                seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill_(~seen, torch.finfo(mask.dtype).min)
            return (args, kwargs | {"attention_mask": seen}) if "attention_mask" in kwargs else ((args[0], seen, *args[2:]), kwargs)

        return hook


def _seen_keys(mask: Tensor) -> Tensor:
    """Tokens of each text, of a mask [B, 1, queries, keys]."""
    first = mask[:, 0, 0]
    return (first if mask.dtype == torch.bool else first == 0).sum(1)


def _attention_of(model: nn.Module, block: str) -> Any:
    found = [module for module in model.get_submodule(block).modules() if "config" in vars(module) and hasattr(module, "scaling")]
    if len(found) != 1:
        raise InputError(f"cannot understand {block}: {len(found)} attentions were found whose weights can be watched, one is expected")
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    return found[0]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> Any:
    """As the model attends, with the weights of the class token's query kept, mean over heads."""
    name = vars(module)["class_attention"]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    logits = wide(query[:, :, :1]) @ wide(key).transpose(2, 3) * scale
    if attention_mask is not None:
        row = attention_mask[:, :, :1]
        logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row
    vars(module)["class_weights"] = logits.softmax(3).mean(1)[:, 0]
    attend = ALL_ATTENTION_FUNCTIONS["sdpa" if name == "eager" else name]
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
