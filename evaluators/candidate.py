"""A candidate: the dense model with levels put in force. Only what changed since the last candidate is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from autoeff.evaluators.bank import Bank, Chain, Step
from autoeff.evaluators.packed_linears import PackedLinears
from autoeff.evaluators.serving import forms
from autoeff.spaces.knob import KINDS, Knob, Undo, swap
from autoeff.spaces.sites import Structure
from autoeff.spaces.space import SearchSpace

__all__ = ["Candidate"]


class Candidate:
    """Moves one model from configuration to configuration.

    Decisions that are about the same linears form a tree of the space. A tree that changes is undone, last in, first out, and
    applied anew: the linears get what their chain of levels makes of them, then levels that act on the model are applied in the
    order of their kinds. Trees that did not change are left alone.

    Args:
        packed: Lets linears compute with the codes that a kernel reads; None decodes them all.

    Attributes:
        indices: Level indices in force, normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        space: SearchSpace,
        knobs: Mapping[str, Knob],
        bank: Bank,
        packed: PackedLinears | None = None,
    ) -> None:
        self.model, self.space, self.bank, self.packed = model, space, bank, packed
        self._structure = structure
        self._decoded = False
        self.indices: tuple[int, ...] = (0,) * len(space.decisions)
        self._sites = {site.name: site for site in structure.sites}
        self._knobs = knobs
        self._undo: dict[int, list[Undo]] = {}
        self._trees = {root: _tree(space, root) for root in space.roots}
        self._groups = {root: self._together(tree) for root, tree in self._trees.items()}

    def set(self, indices: Sequence[int], *, decoded: bool = False) -> None:
        """Puts a configuration in force. After an exception the model is in no defined state.

        Args:
            indices: Level indices.
            decoded: Whether parameters are to hold the values also of linears that could compute with codes.
        """
        wanted = self.space.normalised(indices)
        anew = self.packed is not None and decoded != self._decoded
        changed = [root for root, tree in self._trees.items() if any(wanted[i] != self.indices[i] or (anew and wanted[i]) for i in tree)]
        packed = None if decoded else self.packed
        taken = {} if packed is None else forms(self._structure, self.space, self._knobs, wanted)
        for root in changed:
            for undo in reversed(self._undo.pop(root, [])):
                undo()
        for root in changed:
            undos = self._undo.setdefault(root, [])
            for linears, decisions in self._groups[root]:
                if chain := self.chain(decisions, wanted):
                    on_kernels = {} if packed is None else packed.put({name: taken[name] for name in linears})
                    undos += on_kernels.values()
                    if left := [name for name in linears if name not in on_kernels]:
                        undos.append(swap(self.model, self.bank.decoded(chain, left)))
            for i in sorted(self._trees[root], key=lambda i: KINDS.index(self._knobs[self.space.decisions[i].knob].kind)):
                if wanted[i]:
                    step = self.step(i, wanted[i])
                    undos.append(step.knob.apply_built(self.model, step.site, step.level, self.built(i, wanted)))
        self.indices, self._decoded = wanted, decoded
        if packed is not None:
            packed.calls = 0

    @property
    def kernel_use(self) -> dict[str, int]:
        """For the record: linears that compute with codes, their calls since `set`, linears with decoded values; empty where none may."""
        if self.packed is None:
            return {}
        changed = sum(len(linears) for groups in self._groups.values() for linears, i in groups if self.chain(i, self.indices))
        on_kernels = len(self.packed.in_force)
        return {"packed_linears": on_kernels, "packed_calls": self.packed.calls, "decoded_linears": changed - on_kernels}

    def first_difference(self, other: Sequence[int]) -> int:
        """Index of the first block in which the configuration in force differs from `other`; a number past every block if none."""
        blocks = [d.block for d, a, b in zip(self.space.decisions, self.indices, other, strict=True) if a != b]
        return min(blocks, default=1 << 30)

    def step(self, decision: int, level: int) -> Step:
        """A level of a decision."""
        found = self.space.decisions[decision]
        return Step(self._knobs[found.knob], self._sites[found.site], found.levels[level])

    def chain(self, decisions: Sequence[int], indices: Sequence[int]) -> Chain:
        """The levels other than dense that some decisions take."""
        return tuple(self.step(i, indices[i]) for i in decisions if indices[i])

    def built(self, decision: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the bank keeps for a level that acts on the model by it, found in the shapes that earlier levels leave."""
        step = self.step(decision, indices[decision])
        if not step.knob.applies_built:
            return {}
        about = self.decisions_about(step.site.linears[-1].name) if step.site.linears else []
        shaping = [i for i in about if i < decision and self._knobs[self.space.decisions[i].knob].kind == "structure"]
        return self.bank.packed((*self.chain(shaping, indices), step))

    def decisions_about(self, linear: str) -> list[int]:
        """The decisions about a linear that act through its values, in the order in which they do."""
        return next((decisions for groups in self._groups.values() for linears, decisions in groups if linear in linears), [])

    def _together(self, tree: Sequence[int]) -> list[tuple[tuple[str, ...], list[int]]]:
        """The linears of a tree, grouped by the decisions whose levels make their values."""
        about: dict[str, list[int]] = {}
        for i in tree:
            decision = self.space.decisions[i]
            if self._knobs[decision.knob].of_values:
                for linear in self._sites[decision.site].linears:
                    about.setdefault(linear.name, []).append(i)
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, decisions in about.items():
            groups.setdefault(tuple(decisions), []).append(name)
        return [(tuple(linears), list(decisions)) for decisions, linears in groups.items()]


def _tree(space: SearchSpace, root: int) -> list[int]:
    """The decisions of a tree in the order of the space: parents first."""
    return sorted([root, *(i for child in space.children[root] for i in _tree(space, child))])
