"""Builds the search space of a model: which knobs decide where, what depends on what, and what every level costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import KINDS, Cost, Knob, make_knob
from autoeff.spaces.material import SAMPLES
from autoeff.spaces.sites import BYTES_DENSE, Linear, Site, Structure
from autoeff.spaces.space import Context, Decision, SearchSpace, SpaceSpec

__all__ = ["FurtherCost", "build_space"]

FurtherCost = Callable[[Knob, Site, Level, Cost], Cost]
"""What a level changes beyond the cost that its knob states, at a site as earlier levels leave it."""


_Left = Mapping[str, "tuple[Linear, ...] | Site"]


def build_space(
    structure: Structure, spec: SpaceSpec, further: FurtherCost = lambda knob, site, level, cost: {}, dense: Cost | None = None
) -> tuple[SearchSpace, dict[str, Knob]]:
    """The space of `structure` under `spec`, and its knobs by name.

    Args:
        structure: Blocks and sites.
        spec: What the user says.
        further: Changes of primary quantities that only a machine can tell, such as times.
        dense: Their values for the dense model.

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
    stored = frozenset(linear.name for site, name in pairs if knobs[name].kind == "weight" for linear in site.linears)
    decisions: list[Decision] = []
    shapes: list[dict[Context, _Left]] = []  # of each decision: by its context and branch, what is left of linears and caches
    branching: dict[str, int] = {}  # linear name -> index of the last decision with branches that is about it
    thinning: dict[str, int] = {}  # attention -> index of the last decision with branches that is about its keys and values alone
    shaping: dict[str, int] = {}  # the same, with those that make its values too: they are undone together
    for site, name in pairs:
        knob, levels = knobs[name], _levels(knobs[name], site, spec)
        if len(levels) < 2:
            continue
        if knob.needs - SAMPLES and any(linear.experts for linear in site.linears):
            raise InputError(
                f"knob {name} needs {', '.join(sorted(knob.needs))}, which is not collected for experts ({site.name}); "
                "exclude such sites, or choose a method that needs no text"
            )
        above = shaping if knob.of_values else branching
        if knob.kind == "cache":
            parent = thinning.get(site.attention, branching.get(_first_linear(structure, site.attention)))
        else:
            parent = above.get(site.linears[0].name) if site.linears else None
        contexts: Mapping[Context, _Left] = {(): {}} if parent is None else shapes[parent]
        seen = {context: _reshaped(site, linears) for context, linears in contexts.items()}
        branches = _branches(knob, site, levels)
        costs = {context: tuple(_cost(knob, as_left, level, further, stored) for level in levels) for context, as_left in seen.items()}
        decisions.append(Decision(site.name, name, knob.first_block(site), levels, costs, parent, branches, knob.uniform))
        followed = {branch: level for branch, level in zip(reversed(branches), reversed(levels), strict=True) if branch is not None}
        shapes.append(
            {
                (*context, branch): {**contexts[context], **_left(knob.left(as_left, level))}
                for context, as_left in seen.items()
                for branch, level in followed.items()
            }
        )
        if knob.kind == "cache":  # what is kept of the tokens changes nothing about linears
            if set(branches) != {0}:
                thinning[site.attention] = len(decisions) - 1
            continue
        latest = dict.fromkeys((linear.name for linear in site.linears), len(decisions) - 1)
        if set(branches) != {0}:
            branching.update(latest)
        if set(branches) != {0} or knob.of_values:
            shaping.update(latest)
    if not decisions:
        raise InputError(f"the space is empty: include, exclude and levels leave nothing to decide for {', '.join(knobs) or 'no knob'}")
    constants: dict[str, int] = {}
    for knob in knobs.values():
        decided = {decision.site for decision in decisions if decision.knob == knob.name}
        about = tuple(site for site in structure.sites if knob.kind != "trained" or site.name in decided)  # what is not decided has none
        constants |= knob.constants(replace(structure, sites=about))
    return SearchSpace(tuple(decisions), _dense(structure) | constants | dict(dense or {})), knobs


def _cost(knob: Knob, site: Site, level: Level, further: FurtherCost, stored: frozenset[str]) -> dict[str, int]:
    """The knob's own cost, what of its bytes is not read for a token, and what `further` adds.

    Linears that other levels may have `stored` otherwise are not read by kernels that skip channels of 16-bit weights.
    """
    cost = dict(knob.cost(site, level))
    if not stored.isdisjoint(linear.name for linear in site.linears):
        cost.pop("expected_read_bytes", None)
    read = _read(knob, site, level, cost)
    return {**cost, **({"read_bytes": read} if read else {}), **further(knob, site, level, cost)}


def _read(knob: Knob, site: Site, level: Level, cost: Cost) -> int:
    """Bytes of linears that are read less; of experts those count that the tokens decoded at once are sent to."""
    mixed = [linear for linear in site.linears if linear.experts]
    if (mixed and knob.kind in ("structure", "runtime")) or site.kind == "block":
        left = () if knob.silences(site, level) else knob.left(site, level).linears
        return BYTES_DENSE * (sum(linear.read_parameters for linear in left) - sum(linear.read_parameters for linear in site.linears))
    if knob.kind != "structure" and knob.kernel(site, level) is None:
        return 0
    changed = cost.get("linear_bytes", 0) * (site.linears[0].reads if site.linears else 1)
    return changed * mixed[0].experts_read // mixed[0].experts if mixed else changed


def _first_linear(structure: Structure, attention: str) -> str:
    return next(site.linears[0].name for site in structure.sites if site.name == attention)


def _left(site: Site) -> _Left:
    """What later decisions must know of a site, by the names that its linears have in the model and of its attention."""
    left: dict[str, tuple[Linear, ...] | Site] = {}
    for name, linears in groupby(site.linears, key=lambda linear: linear.of_model):
        left[name] = tuple(linears)
    return left if site.kv is None else left | {site.attention: site}


def _reshaped(site: Site, left: _Left) -> Site:
    """The site with what is `left` of its linears, keys and values."""
    linears: list[Linear] = []
    for linear in site.linears:
        found = left.get(linear.name, (linear,))
        assert isinstance(found, tuple)
        linears += found
    cached = left.get(site.attention) if site.kv is not None else None
    if isinstance(cached, Site):
        site = replace(site, kv_bytes=cached.kv_bytes, kv=cached.kv)
    return replace(site, linears=tuple(linears))


def _branches(knob: Knob, site: Site, levels: Sequence[Level]) -> tuple[int | None, ...]:
    """The branch of each level: equal where the level leaves the same site, None where it silences what comes later."""
    known: dict[Site, int] = {}
    return tuple(None if knob.silences(site, level) else known.setdefault(knob.left(site, level), len(known)) for level in levels)


def _pairs(structure: Structure, knobs: Mapping[str, Knob]) -> list[tuple[Site, str]]:
    """Site and knob of every decision; at one site those that silence others come first, then the order of the kinds.

    Of one kind masks come before codes, and what leaves another shape before what does not.

    The order in which the user names the knobs plays no part, so the same knobs are the same space.
    """
    position = {site.name: i for i, site in enumerate(structure.sites)}

    def order(pair: tuple[Site, str]) -> tuple[int, bool, int, bool, bool, str]:
        site, name = pair
        silences = any(knobs[name].silences(site, level) for level in knobs[name].levels(site))
        reshapes = any(knobs[name].left(site, level) != site for level in knobs[name].levels(site) if not knobs[name].silences(site, level))
        return position[site.name], not silences, KINDS.index(knobs[name].kind), not knobs[name].beside, not reshapes, name

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
        "read_bytes": sum(item.read_parameters for item in structure.linears) * BYTES_DENSE,
        "linear_parameters": linear,
        "other_bytes": (structure.parameters - linear) * BYTES_DENSE,
        "lookup_bytes": structure.lookup_parameters * BYTES_DENSE,
        "kv_bytes_per_token": sum(site.kv_bytes for site in structure.sites if site.kind == "attention"),
        "flops_per_token": 2 * (sum(item.parameters_per_token for item in structure.linears) + structure.head_parameters),
    }
