"""The search space: decisions, what each level costs, and which configurations are the same.

A space is plain data, and this module imports no more than that. Samplers, storage and reports work from it alone; only the
evaluator needs the model again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import yaml

from autoeff.errors import InputError
from autoeff.spaces.configuration import Configuration, Level, digest_of

__all__ = ["Context", "Decision", "SearchSpace", "SpaceSpec"]

FORMAT = 1

Context = tuple[int, ...]
"""The branches of a decision's ancestors, outermost first."""


@dataclass(frozen=True)
class SpaceSpec:
    """What the user says about the space.

    Attributes:
        knobs: Settings by knob name.
        include: Globs over decision keys (`site:knob`); a decision needs one match.
        exclude: Globs that remove decisions again.
        levels: Glob to allowed levels; the dense level always stays. The last matching glob holds.
        untie: Split fused sites: every linear decides for itself.
    """

    knobs: Mapping[str, Mapping[str, Any]]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    levels: Mapping[str, Sequence[Level]] = field(default_factory=dict)
    untie: bool = False


@dataclass(frozen=True)
class Decision:
    """One (site, knob) with its ordered levels.

    Attributes:
        site: Name of the site.
        knob: Name of the knob; empty where the user's own code is searched, whose decisions have no knob.
        block: Index of the first block that computes something else.
        levels: First the dense one, then by falling cost.
        costs: By branch of every ancestor, outermost first: for each level the change of the primary quantities on top of them.
        parent: Index of the decision whose level changes what this one is about, or None.
        branches: For each level the branch that the children follow. Levels that leave the same shapes share one; the dense level
            is in branch 0; None makes the children inert.
        uniform: Whether "this level everywhere" is a baseline.
    """

    site: str
    knob: str
    block: int
    levels: tuple[Level, ...]
    costs: Mapping[Context, tuple[Mapping[str, int], ...]]
    parent: int | None = None
    branches: tuple[int | None, ...] = ()
    uniform: bool = True

    def __post_init__(self) -> None:
        if not self.branches:
            object.__setattr__(self, "branches", (0,) * len(self.levels))

    @property
    def key(self) -> str:
        return f"{self.site}:{self.knob}" if self.knob else self.site

    @property
    def alone(self) -> tuple[Mapping[str, int], ...]:
        """The cost of each level where every ancestor is dense."""
        return self.costs[(0,) * len(next(iter(self.costs)))]


@dataclass(frozen=True)
class SearchSpace:
    """Decisions in a fixed order, parents before children.

    Attributes:
        decisions: The order is that of the blocks.
        dense: Primary quantities of the dense model: `linear_bytes`, `linear_parameters`, `other_bytes`, `lookup_bytes`,
            `kv_bytes_per_token`, `flops_per_token`, `read_bytes` (of the linears, as kernels read them: stored bytes where a kernel serves
            the level, dense ones elsewhere, of experts those that a batch is sent to; spaces stored before there was latency lack it), and
            where latency is asked for `decode_ns`, `prefill_ns` (predicted) or `decode_floor_ns`, `prefill_floor_ns` (estimated). Where
            knobs of kind `cache` decide, of one sequence: `cache_bytes`, what the context takes at 16 bit, from which their levels save;
            `block_bytes`.
            Where adapters are trained: `trainable_parameters` and `adapter_bytes`, of the adapter in full.
    """

    decisions: tuple[Decision, ...]
    dense: Mapping[str, int]

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each decision key."""
        return {decision.key: i for i, decision in enumerate(self.decisions)}

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each decision those whose parent it is."""
        found: list[list[int]] = [[] for _ in self.decisions]
        for i, decision in enumerate(self.decisions):
            if decision.parent is not None:
                found[decision.parent].append(i)
        return tuple(tuple(items) for items in found)

    @cached_property
    def roots(self) -> tuple[int, ...]:
        return tuple(i for i, decision in enumerate(self.decisions) if decision.parent is None)

    @cached_property
    def size(self) -> int:
        """Number of different configurations, inert decisions not told apart."""

        def count(i: int) -> int:
            below = prod(count(c) for c in self.children[i])
            return sum(1 if branch is None else below for branch in self.decisions[i].branches)

        return prod(count(i) for i in self.roots)

    @cached_property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def contexts(self, indices: Sequence[int]) -> list[Context | None]:
        """For each decision the branches that its ancestors take, or None where it is inert."""
        result: list[Context | None] = []
        for decision in self.decisions:
            p = decision.parent
            if p is None:
                result.append(())
                continue
            above, branch = result[p], self.decisions[p].branches[indices[p]]
            result.append(None if above is None or branch is None else (*above, branch))
        return result

    def context(self, indices: Sequence[int], i: int) -> Context | None:
        """The same for decision `i` alone."""
        found: list[int] = []
        while (p := self.decisions[i].parent) is not None:
            branch = self.decisions[p].branches[indices[p]]
            if branch is None:
                return None
            found.append(branch)
            i = p
        return tuple(reversed(found))

    def active(self, indices: Sequence[int]) -> list[bool]:
        """For each decision whether its level has any effect."""
        return [context is not None for context in self.contexts(indices)]

    def normalised(self, indices: Sequence[int]) -> tuple[int, ...]:
        """The same configuration with every inert decision at its first level."""
        return tuple(i if on else 0 for i, on in zip(indices, self.active(indices), strict=True))

    def at(self, indices: Sequence[int]) -> Configuration:
        """The canonical configuration with these level indices."""
        return Configuration({d.key: d.levels[i] for d, i in zip(self.decisions, self.normalised(indices), strict=True)})

    def configuration(self, levels: Mapping[str, Level]) -> Configuration:
        """The canonical configuration with these levels; decisions left out are dense.

        Raises:
            InputError: An unknown decision or level.
        """
        return self.at(self.indices(levels))

    def indices(self, levels: Mapping[str, Level]) -> tuple[int, ...]:
        """Level indices in the order of `decisions`; decisions left out are dense."""
        result = [0] * len(self.decisions)
        for key, level in levels.items():
            if key not in self.index:
                raise InputError(f"no decision {key!r} in this space of {len(self.decisions)}; the first is {self.decisions[0].key!r}")
            decision = self.decisions[self.index[key]]
            if level not in decision.levels:
                raise InputError(f"{key}: no level {level!r}; allowed: {', '.join(map(str, decision.levels))}")
            result[self.index[key]] = decision.levels.index(level)
        return tuple(result)

    @cached_property
    def dense_configuration(self) -> Configuration:
        return self.at([0] * len(self.decisions))

    @cached_property
    def uniform(self) -> Mapping[str, Configuration]:
        """The baselines "one level everywhere", by `knob=level`; every other knob stays dense."""
        found: dict[str, Configuration] = {}
        for knob in dict.fromkeys(d.knob for d in self.decisions if d.uniform):
            levels = dict.fromkeys(level for d in self.decisions if d.knob == knob for level in d.levels[1:])
            for level in levels:
                chosen = {d.key: level for d in self.decisions if d.knob == knob and level in d.levels}
                found[f"{knob}={level}"] = self.configuration(chosen)
        return found

    def sample(self, rng: random.Random) -> tuple[int, ...]:
        """Level indices drawn uniformly for each decision, normalised."""
        return self.normalised([rng.randrange(len(d.levels)) for d in self.decisions])

    def primary(self, indices: Sequence[int]) -> dict[str, int]:
        """Exact primary quantities of a configuration."""
        total = dict(self.dense)
        for decision, i, context in zip(self.decisions, indices, self.contexts(indices), strict=True):
            if context is not None:
                for name, change in decision.costs[context][i].items():
                    total[name] += change
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dense": dict(self.dense),
            "decisions": [
                {
                    "site": d.site, "knob": d.knob, "block": d.block, "levels": list(d.levels),
                    "costs": [{"context": list(context), "levels": [dict(c) for c in costs]} for context, costs in d.costs.items()],
                    "parent": d.parent, "branches": list(d.branches), "uniform": d.uniform,
                }
                for d in self.decisions
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SearchSpace:
        """The space that `to_json` wrote.

        Raises:
            InputError: Another format number, or not what `to_json` writes.
        """
        if value.get("format") != FORMAT:
            raise InputError(f"search space of format {value.get('format')!r}; this version reads {FORMAT}")
        try:
            decisions = tuple(
                Decision(
                    **{
                        **d,
                        "levels": tuple(d["levels"]),
                        "costs": {tuple(row["context"]): tuple(row["levels"]) for row in d["costs"]},
                        "branches": tuple(d["branches"]),
                    }
                )
                for d in value["decisions"]
            )
            return cls(decisions, dict(value["dense"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a search space as this version writes it: {error!r}") from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_json(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> SearchSpace:
        """The space that `to_yaml` wrote.

        Raises:
            InputError: No YAML mapping, or as in `from_json`.
        """
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(value, dict):
            raise InputError(f"not a search space: a YAML mapping is expected, got {type(value).__name__}")
        return cls.from_json(value)
