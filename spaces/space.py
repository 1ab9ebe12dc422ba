"""The search space: decisions, what each level costs, and which configurations are the same.

A space is plain data. Samplers, storage and reports work from it alone; only the evaluator needs the model again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any

import yaml

from autoeff.errors import InputError
from autoeff.spaces.configuration import Configuration, Level, digest_of
from autoeff.spaces.knob import KINDS, Knob, make_knob
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["Decision", "SearchSpace", "SpaceSpec", "build_space"]

FORMAT = 1


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
        knob: Name of the knob.
        block: Index of the block that holds the site.
        levels: First the dense one, then by falling cost.
        costs: For each level the change of the primary quantities against dense.
        parent: Index of the decision that can make this one inert, or None.
        silencing: Level indices of this decision at which its children are inert.
        uniform: Whether "this level everywhere" is a baseline.
    """

    site: str
    knob: str
    block: int
    levels: tuple[Level, ...]
    costs: tuple[Mapping[str, int], ...]
    parent: int | None = None
    silencing: frozenset[int] = frozenset()
    uniform: bool = True

    @property
    def key(self) -> str:
        return f"{self.site}:{self.knob}"


@dataclass(frozen=True)
class SearchSpace:
    """Decisions in a fixed order, parents before children.

    Attributes:
        decisions: The order is that of the blocks.
        dense: Primary quantities of the dense model: `linear_bytes`, `linear_parameters`, `other_bytes`, `lookup_bytes`,
            `kv_bytes_per_token`, `flops_per_token`.
    """

    decisions: tuple[Decision, ...]
    dense: Mapping[str, int]

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each decision key."""
        return {decision.key: i for i, decision in enumerate(self.decisions)}

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each decision the decisions that it can make inert."""
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
            silent = len(self.decisions[i].silencing)
            return silent + (len(self.decisions[i].levels) - silent) * below

        return prod(count(i) for i in self.roots)

    @cached_property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def active(self, indices: Sequence[int]) -> list[bool]:
        """For each decision whether its level has any effect."""
        result: list[bool] = []
        for decision in self.decisions:
            p = decision.parent
            result.append(p is None or (result[p] and indices[p] not in self.decisions[p].silencing))
        return result

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

    def uniform(self) -> dict[str, Configuration]:
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
        for decision, i, on in zip(self.decisions, indices, self.active(indices), strict=True):
            if on:
                for name, change in decision.costs[i].items():
                    total[name] += change
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dense": dict(self.dense),
            "decisions": [
                {
                    "site": d.site, "knob": d.knob, "block": d.block, "levels": list(d.levels), "costs": [dict(c) for c in d.costs],
                    "parent": d.parent, "silencing": sorted(d.silencing), "uniform": d.uniform,
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
                Decision(**{**d, "levels": tuple(d["levels"]), "costs": tuple(d["costs"]), "silencing": frozenset(d["silencing"])})
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


def build_space(structure: Structure, spec: SpaceSpec) -> tuple[SearchSpace, dict[str, Knob]]:
    """The space of `structure` under `spec`, and its knobs by name.

    Raises:
        InputError: Unknown or conflicting knobs, a glob that matches nothing, or no decision left.
    """
    knobs = {name: make_knob(name, settings) for name, settings in spec.knobs.items()}
    for name, knob in knobs.items():
        if clash := sorted(knob.conflicts & knobs.keys()):
            raise InputError(f"knob {name} cannot be searched together with {', '.join(clash)}")
        if not knob.sites(structure):
            raise InputError(f"knob {name} finds nothing to decide about in this {structure.model_type} model")
    pairs = _pairs(structure, knobs)
    _check_globs(spec, pairs, knobs)
    decisions: list[Decision] = []
    silencers: dict[str, int] = {}  # linear name -> index of the decision that can silence it
    for site, name in pairs:
        levels = _levels(knobs[name], site, spec)
        if len(levels) < 2:
            continue
        silencing = frozenset(i for i, level in enumerate(levels) if knobs[name].silences(site, level))
        costs = tuple(dict(knobs[name].cost(site, level)) for level in levels)
        parent = silencers.get(site.linears[0].name) if site.linears else None
        decisions.append(Decision(site.name, name, site.block, levels, costs, parent, silencing, knobs[name].uniform))
        if silencing:
            silencers.update(dict.fromkeys((linear.name for linear in site.linears), len(decisions) - 1))
    if not decisions:
        raise InputError(f"the space is empty: include, exclude and levels leave nothing to decide for {', '.join(knobs) or 'no knob'}")
    return SearchSpace(tuple(decisions), _dense(structure)), knobs


def _pairs(structure: Structure, knobs: Mapping[str, Knob]) -> list[tuple[Site, str]]:
    """Site and knob of every decision; at one site those that silence others come first, then the order of the kinds.

    The order in which the user names the knobs plays no part, so the same knobs are the same space.
    """
    position = {site.name: i for i, site in enumerate(structure.sites)}

    def order(pair: tuple[Site, str]) -> tuple[int, bool, int, str]:
        site, name = pair
        silences = any(knobs[name].silences(site, level) for level in knobs[name].levels(site))
        return position[site.name], not silences, KINDS.index(knobs[name].kind), name

    return sorted(((site, name) for name, knob in knobs.items() for site in knob.sites(structure)), key=order)


def _check_globs(spec: SpaceSpec, pairs: Sequence[tuple[Site, str]], knobs: Mapping[str, Knob]) -> None:
    for glob in (*spec.include, *spec.exclude, *spec.levels):
        matched = [(site, name) for site, name in pairs if fnmatchcase(f"{site.name}:{name}", glob)]
        if not matched:
            first = f"; the first is '{pairs[0][0].name}:{pairs[0][1]}'" if pairs else ""
            raise InputError(f"the glob {glob!r} matches no decision{first}")
        known = list(dict.fromkeys(level for site, name in matched for level in knobs[name].levels(site)))
        if unknown := [level for level in spec.levels.get(glob, ()) if level not in known]:
            raise InputError(f"{glob}: no level {unknown[0]!r}; allowed: {', '.join(map(str, known))}")


def _levels(knob: Knob, site: Site, spec: SpaceSpec) -> tuple[Level, ...]:
    """What `spec` leaves of the levels; one level or none is nothing to decide."""
    key = f"{site.name}:{knob.name}"
    if not any(fnmatchcase(key, glob) for glob in spec.include) or any(fnmatchcase(key, glob) for glob in spec.exclude):
        return ()
    levels = knob.levels(site)
    choice = next((spec.levels[glob] for glob in reversed(list(spec.levels)) if fnmatchcase(key, glob)), levels)
    return tuple(level for level in levels if level in choice or level == levels[0])


def _dense(structure: Structure) -> dict[str, int]:
    linear = sum(item.parameters for item in structure.linears)
    return {
        "linear_bytes": linear * BYTES_DENSE,
        "linear_parameters": linear,
        "other_bytes": (structure.parameters - linear) * BYTES_DENSE,
        "lookup_bytes": structure.lookup_parameters * BYTES_DENSE,
        "kv_bytes_per_token": sum(site.kv_bytes for site in structure.sites),
        "flops_per_token": 2 * (linear + structure.head_parameters),
    }
