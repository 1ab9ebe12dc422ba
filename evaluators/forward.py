"""Runs the body of a model over windows and reuses what earlier candidates share.

Two candidates that agree on the first k blocks have the same hidden states up to there. The inputs of every block are kept for
the dense model and for the last candidate (as far as memory allows), and a forward pass starts at the first block that differs
from one of them. Reuse is bit-exact: the same tensors enter the same operations in the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BATCH_TOKENS", "Forward", "States", "fed_to", "state_bytes", "state_stride"]

BATCH_TOKENS = 2048
"""Large enough for the matrix products, small enough to stay in cache."""


States = Mapping[int, Tensor]
"""Inputs of blocks over one batch, by block."""


class Forward:
    """Final hidden states of a model whose blocks can be entered midway.

    Args:
        model: Its blocks' `forward` is wrapped for good.
        blocks: Module paths, in order.
        stride: The inputs of every how manieth block are kept, see `state_stride`; None switches reuse off.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], stride: int | None) -> None:
        self.body: Any = getattr(model, "base_model", model)
        self._fed = getattr(model, "main_input_name", "input_ids")
        self.stride = stride
        self.blocks = len(blocks)
        self.computed_blocks = 0
        self.all_blocks = 0
        self._start = 0
        self._entry: Tensor | None = None
        self._seen: dict[int, Tensor] | None = None
        self._returns_tuple = False
        for index, path in enumerate(blocks):
            block = model.get_submodule(path)
            block.forward = self._wrapped(index, block.forward)

    @staticmethod
    def batches(windows: int, tokens: int) -> list[slice]:
        """How windows of so many tokens in all are batched: a quarter of them at most, so that a quarter fidelity reuses whole batches."""
        step = max(1, min(windows // 4, BATCH_TOKENS * windows // tokens))
        return [slice(i, min(i + step, windows)) for i in range(0, windows, step)]

    @torch.no_grad()
    def run(
        self, inputs: Tensor, mask: Tensor | None, rows: slice, kept: Sequence[States | None], first_changed: Sequence[int]
    ) -> tuple[Tensor, States]:
        """Final hidden states of `inputs[rows]`, less columns of mere padding, and the inputs of the blocks that are kept.

        Args:
            inputs: Windows, int64 [windows, tokens], or images, float32 [images, C, H, W].
            mask: Attention mask of the same shape with the padding on the right, or None.
            rows: The batch.
            kept: What earlier runs over the same batch returned, None where there is nothing.
            first_changed: For each of them the first block whose parameters differ from it.
        """
        self._start, self._entry, self._seen = 0, None, {}
        for states, changed in zip(kept, first_changed, strict=True):
            # the last block always runs: what follows it needs its output
            start = max((block for block in states or () if block <= min(changed, self.blocks - 1)), default=0)
            if states is not None and start > self._start:
                self._start, self._entry = start, states[start]
                self._seen = {block: entry for block, entry in states.items() if block < start}
        self.computed_blocks += self.blocks - self._start
        self.all_blocks += self.blocks
        arguments: dict[str, Any] = {self._fed: fed_to(self.body, inputs[rows])}
        if mask is not None:
            width = int(mask[rows].sum(1).max())  # columns that hold nothing but padding are left out
            arguments = {self._fed: inputs[rows, :width], "attention_mask": mask[rows, :width]}
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
            if self._seen is not None and self.stride is not None and index and index % self.stride == 0:
                self._seen[index] = hidden
            result = within.inner(hidden, *args[1:], **kwargs)
            self._returns_tuple = isinstance(result, tuple)
            return result

        within: Any = forward
        within.inner = original  # `spaces/blocks.py` puts levels around it
        return forward


def fed_to(model: nn.Module, inputs: Tensor) -> Tensor:
    """Windows, or images in the dtype that a GPU computes in: not every model rounds them itself. A CPU computes in float32."""
    if not inputs.is_floating_point() or inputs.device.type == "cpu":
        return inputs
    return inputs.to(next(model.parameters()).dtype)


def state_stride(blocks: int, tokens: int, hidden_size: int, keep_bytes: int) -> int | None:
    """The least s so that the inputs of the blocks s, 2 s, … fit into `keep_bytes`, for two candidates over `tokens`; None if none do."""
    one = state_bytes(1, tokens, hidden_size)
    fitting = keep_bytes // one if one else 0
    return next((stride for stride in range(1, blocks) if (blocks - 1) // stride <= fitting), None)


def state_bytes(kept_blocks: int, tokens: int, hidden_size: int) -> int:
    """Bytes of the float32 inputs of some blocks, for two candidates."""
    return 2 * kept_blocks * tokens * hidden_size * 4
