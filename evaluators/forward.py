"""Runs the body of a model over windows and reuses what earlier candidates share.

Two candidates that agree on the first k blocks have the same hidden states up to there. The inputs of every block are kept for
the dense model and for the last candidate (where memory allows), and a forward pass starts at the first block that differs
from one of them. Reuse is bit-exact: the same tensors enter the same operations in the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BlockStates", "Forward"]

_BATCH_TOKENS = 2048  # large enough for the matrix products, small enough to stay in cache


@dataclass
class BlockStates:
    """Inputs of every block: `inputs[batch][block]`, and which configuration they belong to (level indices per block)."""

    signature: tuple[Any, ...] | None = None
    inputs: list[list[Tensor]] = field(default_factory=list)


class Forward:
    """Final hidden states of a model whose blocks can be entered midway.

    Args:
        model: Its blocks' `forward` is wrapped for good.
        blocks: Module paths, in order.
        keep_bytes: Memory for kept states; 0 switches reuse off.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], keep_bytes: int) -> None:
        self.body: Any = getattr(model, "base_model", model)
        self.keep_bytes = keep_bytes
        self.blocks = len(blocks)
        self.computed_blocks = 0
        self.all_blocks = 0
        self._start = 0
        self._entry: Tensor | None = None
        self._seen: list[Tensor] | None = None
        self._returns_tuple = False
        for index, path in enumerate(blocks):
            block = model.get_submodule(path)
            block.forward = self._wrapped(index, block.forward)

    def batches(self, ids: Tensor, mask: Tensor | None = None) -> list[slice]:
        """How windows [windows, tokens] are batched: a quarter of them at most, so that a quarter fidelity reuses whole batches."""
        length = ids.shape[1] if mask is None else max(1, int(mask.sum()) // len(mask))
        step = max(1, min(len(ids) // 4, _BATCH_TOKENS // length))
        return [slice(i, min(i + step, len(ids))) for i in range(0, len(ids), step)]

    def fits(self, ids: Tensor, hidden_size: int) -> bool:
        """Whether the states of two candidates over `ids` fit into `keep_bytes`."""
        return 2 * self.blocks * ids.numel() * hidden_size * 4 <= self.keep_bytes

    @torch.no_grad()
    def run(
        self, ids: Tensor, mask: Tensor | None, rows: slice, kept: Sequence[list[Tensor] | None], first_changed: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states of `ids[rows]`, less columns of mere padding, and the inputs of every block on the way.

        Args:
            ids: Windows, int64 [windows, tokens].
            mask: Attention mask of the same shape with the padding on the right, or None.
            rows: The batch.
            kept: Block inputs of earlier runs over the same batch, None where there are none.
            first_changed: For each of them the first block whose parameters differ from it.
        """
        self._start, self._entry = 0, None
        states: list[Tensor] = []
        for inputs, changed in zip(kept, first_changed, strict=True):
            start = min(changed, self.blocks - 1)  # the last block always runs: what follows it needs its output
            if inputs is not None and start > self._start:
                self._start, self._entry, states = start, inputs[start], inputs[:start]
        self._seen = list(states)
        self.computed_blocks += self.blocks - self._start
        self.all_blocks += self.blocks
        arguments: dict[str, Any] = {"input_ids": ids[rows]}
        if mask is not None:
            width = int(mask[rows].sum(1).max())  # columns that hold nothing but padding are left out
            arguments = {"input_ids": ids[rows, :width], "attention_mask": mask[rows, :width]}
        if hasattr(getattr(self.body, "config", None), "use_cache"):
            arguments["use_cache"] = False
        try:
            hidden: Tensor = self.body(**arguments).last_hidden_state
        finally:
            seen, self._seen, self._entry, self._start = self._seen, None, None, 0
        return hidden, seen

    def _wrapped(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index < self._start:
                return (hidden,) if self._returns_tuple else hidden
            if index == self._start and self._entry is not None:
                hidden = self._entry
            if self._seen is not None:
                self._seen.append(hidden)
            result = original(hidden, *args[1:], **kwargs)
            self._returns_tuple = isinstance(result, tuple)
            return result

        return forward
