"""Puts something around what a block computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from autoeff.spaces.knob import Undo

__all__ = ["Call", "around_block", "hidden_of"]

Call = Callable[..., Any]
"""A block's `forward`: hidden states [B, T, H] first, then whatever the model hands on."""


def around_block(model: nn.Module, path: str, wrap: Callable[[Call], Call]) -> Undo:
    """Lets a block compute `wrap` of what it computes; several of them on one block are undone last in, first out.

    Where `evaluators/forward.py` has wrapped the block to enter the model midway, that stays outermost: a block that is passed over
    computes nothing.
    """
    block: Any = model.get_submodule(path)
    outer = vars(block).get("forward")
    if hasattr(outer, "inner"):
        before = outer.inner
        outer.inner = wrap(before)

        def undo_inner() -> None:
            outer.inner = before

        return undo_inner
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return wrapped(hidden, *args[1:], **kwargs)

    wrapped = wrap(original)
    block.forward = forward

    def undo() -> None:
        if outer is None:
            del block.forward
        else:
            block.forward = outer

    return undo


def hidden_of(result: Any) -> Tensor:
    """The hidden states of what a block returns."""
    hidden: Tensor = result[0] if isinstance(result, tuple) else result
    return hidden
