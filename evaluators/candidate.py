"""A candidate: the dense model with levels put in force. Only what changed since the last candidate is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from autoeff.evaluators.bank import Bank
from autoeff.spaces.knob import KINDS, Knob, Undo
from autoeff.spaces.sites import Structure
from autoeff.spaces.space import SearchSpace

__all__ = ["Candidate"]


class Candidate:
    """Moves one model from configuration to configuration.

    Decisions that can touch the same parameters (a tree of the space) are undone last-in-first-out and applied in the order of
    their kinds; trees that did not change are left alone.

    Attributes:
        indices: Level indices in force, normalised.
    """

    def __init__(self, model: nn.Module, structure: Structure, space: SearchSpace, knobs: Mapping[str, Knob], bank: Bank) -> None:
        self.model, self.space, self.bank = model, space, bank
        self.indices: tuple[int, ...] = (0,) * len(space.decisions)
        self._sites = {site.name: site for site in structure.sites}
        self._knobs = knobs
        self._undo: dict[int, list[Undo]] = {}
        self._trees = {root: _tree(space, root) for root in space.roots}

    def set(self, indices: Sequence[int]) -> None:
        """Puts a configuration in force. After an exception the model is in no defined state."""
        wanted = self.space.normalised(indices)
        changed = [root for root, tree in self._trees.items() if any(wanted[i] != self.indices[i] for i in tree)]
        for root in changed:
            for undo in reversed(self._undo.pop(root, [])):
                undo()
        for root in changed:
            for i in sorted(self._trees[root], key=lambda i: KINDS.index(self._knobs[self.space.decisions[i].knob].kind)):
                if wanted[i]:
                    self._apply(root, i, wanted[i])
        self.indices = wanted

    def first_difference(self, other: Sequence[int]) -> int:
        """Index of the first block in which the configuration in force differs from `other`; a number past every block if none."""
        blocks = [d.block for d, a, b in zip(self.space.decisions, self.indices, other, strict=True) if a != b]
        return min(blocks, default=1 << 30)

    def _apply(self, root: int, index: int, level_index: int) -> None:
        decision = self.space.decisions[index]
        knob, site, level = self._knobs[decision.knob], self._sites[decision.site], decision.levels[level_index]
        self._undo.setdefault(root, []).append(knob.apply(self.model, site, level, self.bank.decoded(knob, site, level)))


def _tree(space: SearchSpace, root: int) -> list[int]:
    return [root, *(i for child in space.children[root] for i in _tree(space, child))]
