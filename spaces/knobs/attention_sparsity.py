"""Blocks of a prompt that attention leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.block_attention import block_size, look_at_blocks, most_pairs
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.sites import Site, Structure

__all__ = ["AttentionSparsity"]

_DENSE = 1
_LEAST_BLOCK = 16  # that the kernel takes


@dataclass(frozen=True)
class AttentionSparsity(Knob):
    """The share of its attention that a block of a prompt's tokens keeps; it sees the fewest blocks before it that are likely to hold it.

    How much attention a block gets is guessed from mean vectors; its own block and that of the first token are always seen. Saves
    operations of attention while a prompt is read (`attention_flops`, counted at the most: as if attention were spread evenly), nothing
    while text is generated. Layers with a window that is shorter than the context are left as they are.

    Attributes:
        masses: Levels below 1.
        block: Tokens of a block, a power of two from 16; at most a 32nd of the prompt.

    Source: PBS-Attn, arXiv:2510.21270, without its permutation of tokens.
    """

    name: ClassVar[str] = "attention_sparsity"
    kind: ClassVar[Kind] = "runtime"
    conflicts: ClassVar[frozenset[str]] = frozenset({"kv_bits", "kv_budget", "kv_rank"})
    of_context: ClassVar[bool] = True

    masses: tuple[float, ...] = (0.95, 0.9, 0.8)
    block: int = 128

    def __post_init__(self) -> None:
        if not all(0 < mass < 1 for mass in self.masses) or list(self.masses) != sorted(set(self.masses), reverse=True):
            raise InputError(f"attention_sparsity.masses must fall between 1 and 0: got {', '.join(map(str, self.masses))}")
        if self.block < _LEAST_BLOCK or self.block & self.block - 1:
            raise InputError(f"attention_sparsity.block must be a power of two, at least {_LEAST_BLOCK}: got {self.block}")

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "attention" and site.kv and len(self.levels(site)) > 1]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """1 and every mass that saves more than the one before at the context."""
        levels: list[Level] = [_DENSE]
        for mass in self.masses:
            if self._flops(site, mass) < self._flops(site, levels[-1]):
                levels.append(mass)
        return tuple(levels)

    def constants(self, structure: Structure) -> Mapping[str, int]:
        return {"attention_flops": sum(self._flops(site, _DENSE) for site in structure.sites if site.kind == "attention" and site.kv)}

    def cost(self, site: Site, level: Level) -> Cost:
        return {} if level == _DENSE else {"attention_flops": self._flops(site, level) - self._flops(site, _DENSE)}

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        return swap(model, {}) if level == _DENSE else look_at_blocks(model, site.attention, float(level), self.block)

    def kernel(self, site: Site, level: Level) -> str | None:
        return None if level == _DENSE else "attention_block_sparse"

    def _flops(self, site: Site, level: Level) -> int:
        """Of both products, over one prompt of the context."""
        assert site.kv is not None
        heads = site.linears[-1].in_features // site.kv.value_size
        pairs = most_pairs(site.kv.context, block_size(self.block, site.kv.context), float(level))
        return 2 * heads * (site.kv.key_size + site.kv.value_size) * pairs
