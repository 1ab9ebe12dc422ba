"""A configuration by layers: which level stands where, what each decision saves, and what it was seen to harm alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from autoeff.dashboard.fetch import Terrain
from autoeff.spaces.configuration import Level
from autoeff.spaces.space import Decision

__all__ = [
    "Cell",
    "Grid",
    "Share",
    "changes",
    "damage_grids",
    "damage_of_rows",
    "grids_of",
    "place_name",
    "place_of",
    "saved_by_block",
    "shares_of",
]

Place = tuple[str, ...]
_DECADES = 7
"""Of damage that colours tell apart; less is harmless."""
_PARTS = ("weight_bytes", "kv_bytes", "bytes_per_token", "flops_per_token", "decode_ms", "prefill_ms")


@dataclass(frozen=True)
class Cell:
    """A decision in a map.

    Attributes:
        text: Its level, or its damage.
        share: How dark, from 0 to 1; None where nothing is known.
        title: What a pointer is told.
    """

    text: str
    share: float | None
    title: str


@dataclass(frozen=True)
class Grid:
    """A map of one knob: blocks downwards, places to the right.

    Attributes:
        places: Paths inside a block; in maps of damage with a level behind each.
        names: What is written for each path.
        cells: By block and place; what is not there has no such decision.
    """

    knob: str
    places: tuple[Place, ...]
    names: Mapping[str, str]
    blocks: tuple[int, ...]
    cells: Mapping[tuple[int, Place], Cell]


@dataclass(frozen=True)
class Share:
    """What one decision adds to the costs of a configuration.

    Attributes:
        alone: Quality that its level was seen to lose alone; None where that was not measured.
        saved: By measurement: how much less it is than with the dense level, everything else as it is.
    """

    block: int
    place: str
    knob: str
    level: Level
    alone: float | None
    saved: Mapping[str, float]


def place_of(decision: Decision) -> str:
    """The path of a site inside its block: `self_attn.o_proj`."""
    parts, number = decision.site.split("."), str(decision.block)
    return ".".join(parts[parts.index(number) + 1 :] if number in parts else parts)


def place_name(path: str) -> str:
    """The end of a path, without what all linears are called: `q+k+v` for `self_attn.q_proj+k_proj+v_proj`."""
    return "+".join(part.removesuffix("_proj") for part in path.rpartition(".")[2].split("+"))


def grids_of(ground: Terrain, configuration: Mapping[str, Level]) -> list[Grid]:
    """A map for each knob; decisions that another one left without effect show a dash."""
    space = ground.space
    indices = space.indices(configuration)
    cells: dict[str, dict[tuple[int, Place], Cell]] = {}
    for decision, i, on in zip(space.decisions, indices, space.active(indices), strict=True):
        level = decision.levels[i]
        text = str(level) if on else "\N{EN DASH}"
        share = i / max(1, len(decision.levels) - 1) if on else None
        where = f"{decision.key} = {level}" if on else f"{decision.key}: its part is skipped"
        cells.setdefault(decision.knob, {})[decision.block, (place_of(decision),)] = Cell(text, share, where)
    return _grids(ground, cells)


def damage_grids(ground: Terrain, damage: Mapping[str, Mapping[str, float | None]]) -> list[Grid]:
    """A map for each knob of the quality that each level lost alone, by decision key and level; a level that failed is the darkest.

    Shares are of one logarithmic scale over all knobs, so that maps compare.
    """
    values = [value for levels in damage.values() for value in levels.values() if value is not None and value > 0]
    if not values:
        return []
    high = log(max(values))
    low = max(log(min(values)), high - _DECADES * log(10))
    cells: dict[str, dict[tuple[int, Place], Cell]] = {}
    for decision in ground.space.decisions:
        measured = damage.get(decision.key, {})
        for level in decision.levels[1:]:
            if str(level) not in measured:
                continue
            value = measured[str(level)]
            if value is None:
                cell = Cell("fails", 1.0, f"{decision.key} = {level}: fails")
            else:
                share = max(0.0, (log(value) - low) / (high - low or 1.0)) if value > 0 else 0.0
                cell = Cell(_short(value), share, f"{decision.key} = {level}: {value:.3g}")
            cells.setdefault(decision.knob, {})[decision.block, (place_of(decision), str(level))] = cell
    return _grids(ground, cells)


def damage_of_rows(ground: Terrain, rows: Sequence[Any], quality: str) -> dict[str, dict[str, float | None]]:
    """The damage table as far as it is measured: from trials of origin `table`, each of which differs from dense in one decision."""
    found: dict[str, dict[str, float | None]] = {}
    dense = {decision.key: decision.levels[0] for decision in ground.space.decisions}
    for row in rows:
        changed = [key for key, level in row.configuration.items() if dense.get(key) != level]
        if row.state not in ("succeeded", "failed", "quarantined") or len(changed) != 1:
            continue
        measured = row.measurements.get(quality)
        found.setdefault(changed[0], {})[str(row.configuration[changed[0]])] = None if measured is None else measured.value
    return found


def changes(ground: Terrain, one: Mapping[str, Level], other: Mapping[str, Level]) -> list[tuple[Decision, Level, Level]]:
    """Decisions in which two configurations differ, with both levels."""
    space = ground.space
    pairs = zip(space.decisions, space.indices(one), space.indices(other), strict=True)
    return [(decision, decision.levels[i], decision.levels[j]) for decision, i, j in pairs if i != j]


def shares_of(ground: Terrain, configuration: Mapping[str, Level], damage: Mapping[str, Mapping[str, float | None]]) -> list[Share]:
    """What each decision that is not dense saves, the most first."""
    space, measures = ground.space, ground.costs.measures
    indices = space.indices(configuration)
    names = [name for name in _PARTS if name in measures]
    found = []
    for decision, i, context in zip(space.decisions, indices, space.contexts(indices), strict=True):
        if i == 0 or context is None:
            continue
        change = decision.costs[context][i]
        level = decision.levels[i]
        saved = {name: 0.0 - float(measures[name].change(change)) for name in names}
        found.append(Share(decision.block, place_of(decision), decision.knob, level, damage.get(decision.key, {}).get(str(level)), saved))
    return sorted(found, key=lambda share: -share.saved["weight_bytes"])


def saved_by_block(shares: Sequence[Share], name: str) -> dict[str, dict[int, float]]:
    """What each block saves of a cost, by knob."""
    found: dict[str, dict[int, float]] = {}
    for share in shares:
        blocks = found.setdefault(share.knob, {})
        blocks[share.block] = blocks.get(share.block, 0.0) + share.saved.get(name, 0.0)
    return found


def _grids(ground: Terrain, cells: Mapping[str, Mapping[tuple[int, Place], Cell]]) -> list[Grid]:
    blocks = tuple(sorted({decision.block for decision in ground.space.decisions}))
    grids = []
    for knob, found in cells.items():
        places = tuple(dict.fromkeys(place for _, place in found))
        grids.append(Grid(knob, places, _names([place[0] for place in places]), blocks, found))
    return grids


def _names(paths: Sequence[str]) -> dict[str, str]:
    """Short names, whole paths where two would agree."""
    short = {path: place_name(path) for path in paths}
    return short if len(set(short.values())) == len(short) else {path: path for path in paths}


def _short(value: float) -> str:
    """Two digits of a number, for a narrow cell: `.012`, `3e-5`."""
    text = f"{value:#.2g}" if value >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
    return text.removesuffix(".").removeprefix("0") or "0"
