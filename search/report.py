"""What a search leaves for people: `front.png`, and `report.html` that needs nothing else and no network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import autoeff
from autoeff.search.job import JobSpec
from autoeff.search.own_job import NUMBER, OwnJob, is_own
from autoeff.search.picture import Guest, Picture, draw_png, draw_svg
from autoeff.search.runs import write_file
from autoeff.search.samplers.problem import Problem
from autoeff.search.standing import TABLE_WORDS, cost_columns, cost_titles, judged_cost, problem_of
from autoeff.search.storage.records import Job
from autoeff.spaces.measurements import described
from autoeff.spaces.space import Decision, SearchSpace

__all__ = ["damage_maps", "picture_of", "verdict", "write_report"]

Row = Mapping[str, Any]
_FAILURES_SHOWN = 20
_NOTHING = "\N{EN DASH}"
_TELLS = 0.5  # of the passkeys: a dense model that tells fewer cannot do the task
_ROLES = {
    "dense": "dense", "uniform": "uniform", "additive": "first additive optimum", "seed": "rule",
    "random": "best of random", "found": "found",
}  # fmt: skip


def write_report(folder: Path, job: Job, rows: Sequence[Row], summary: Row) -> tuple[Path, Path]:
    """Writes `front.png` and `report.html` into `folder` and returns their paths; earlier ones are replaced whole.

    `rows` are the public rows of the job's trials, `summary` is its result.

    Raises:
        OSError: `folder` cannot be written.
    """
    space = SearchSpace.from_json(job.space)
    picture = picture_of(job, rows, summary)
    page = _PAGES.get_template("report.html.j2").render(
        job=job,
        own=OwnJob.from_json(job.spec) if is_own(job) else None,
        job_file=yaml.safe_dump(dict(job.spec), sort_keys=False, allow_unicode=True) if is_own(job) else JobSpec.parse(job.spec).to_yaml(),
        summary=summary,
        version=autoeff.__version__,
        folder=folder,
        verdicts=[
            own_verdict(row, summary) if is_own(job) else verdict(row, summary, judged_cost(job), cost_titles(job))
            for row in summary["rows"]
            if row["role"] == "found"
        ],
        columns=cost_columns(job),
        titles=cost_titles(job),
        quality=summary["quality"],
        front_svg=draw_svg(picture),
        chosen="best" if job.spec["limits"] else summary["found"] or "TRIAL",
        maps=_level_maps(space, rows, summary),
        damage=damage_maps(space, summary["table"]["damage"]) if summary["table"] else [],
        failures=_failures(rows),
    )
    paths = folder / "front.png", folder / "report.html"
    write_file(paths[0], draw_png(picture))
    write_file(paths[1], page.encode())
    return paths


def verdict(found: Row, summary: Row, cost: str, titles: Mapping[str, str] = MappingProxyType({})) -> str:
    """One sentence on a found row: its quality and cost, against the uniform level that tells most about it, and its passkeys.

    That level is the cheapest one that costs no less, if it is beaten; else the best one that costs no more. `titles` are of costs that
    are not exact.
    """
    return _beside_uniform(found, summary, cost, titles) + _on_passkeys(found, summary)


def _on_passkeys(found: Row, summary: Row) -> str:
    own, dense = found.get("passkey_accuracy"), next((r.get("passkey_accuracy") for r in summary["rows"] if r["role"] == "dense"), None)
    if own is None or dense is None:
        return ""
    if dense < _TELLS:
        return f"; the dense model tells {dense:.0%} of the passkeys, too few to judge a cache by"
    return f"; it tells {own:.0%} of the passkeys, the dense model {dense:.0%}"


def _beside_uniform(found: Row, summary: Row, cost: str, titles: Mapping[str, str]) -> str:
    quality, title = summary["quality"], titles.get(cost, cost)
    text = f"trial {found['trial']}: {quality} {_text(quality, found['search'])} at {title} {_text(cost, found['costs'][cost])}"
    uniform = [row for row in summary["rows"] if row["role"] == "uniform" and row["search"]]
    above = min((r for r in uniform if r["costs"][cost] >= found["costs"][cost]), key=lambda row: row["costs"][cost], default=None)
    below = min((r for r in uniform if r["costs"][cost] <= found["costs"][cost]), key=lambda row: row["search"], default=None)
    if above is not None and found["search"] < above["search"]:
        cheaper = 1 - found["costs"][cost] / above["costs"][cost]
        at = f"{cheaper:.1%} less {cost}" if cheaper >= 0.0005 else f"the same {cost}"
        return f"{text}; {1 - found['search'] / above['search']:.0%} less {quality} than uniform {above['label']} at {at}"
    if below is None:
        return f"{text}; every uniform level costs more"
    if found["search"] < below["search"]:
        return (
            f"{text}; {1 - found['search'] / below['search']:.0%} less {quality} than uniform {below['label']}, the best that costs no more"
        )
    return f"{text}; nothing was found that beats uniform {below['label']}"


def own_verdict(found: Row, summary: Row) -> str:
    """One sentence on what a search of own code found, beside the reference and the best random configuration."""
    quality = summary["quality"]
    costs = "".join(f", {name} {_text(name, value)}" for name, value in found["costs"].items())
    text = f"trial {found['trial']}: {quality} {_text(quality, found['search'])}{costs}"
    if found["origin"] != "searched":
        return (
            f"{text}; this is {'the reference' if found['origin'] == 'dense' else 'a random configuration'}, and the search found no better"
        )
    names = {"dense": "the reference", "random": "the best of random"}
    beside = [f"{names[r['role']]} has {_text(quality, r['search'])}" for r in summary["rows"] if r["role"] in names]
    return "; ".join([text, *beside])


def picture_of(job: Job, rows: Sequence[Row], summary: Row) -> Picture:
    """What `front.png` shows: every trial measured on the whole search text, the front, the guests and the limit."""
    quality = summary["quality"]
    problem, own = problem_of(job), is_own(job)
    cost = problem.cost_measure
    full = max((tokens for row in rows if (tokens := _tokens(row, quality))), default=None)
    points: dict[str, list[tuple[float, float]]] = {}
    by_number: dict[int, tuple[float, float]] = {}
    for row in rows:
        if full is not None and _tokens(row, quality) == full:  # what was measured on fewer tokens has no place on this axis
            point = _value(row, cost), row["measurements"][quality]["value"]
            points.setdefault(row["origin"], []).append(point)
            by_number[row["trial"]] = point
    front = set(summary["front"])
    guests = [
        Guest(
            row["role"],
            row["label"] or ("reference" if own and row["role"] == "dense" else row["role"]),
            row["trial"] if cost == NUMBER else row["costs"][cost],
            0.0 if row["role"] == "dense" and not own else row["search"],
            row["spearman_held_out"],
        )
        for row in summary["rows"]
    ]
    return Picture(
        quality=quality,
        cost=cost,
        points={origin: points[origin] for origin in points if origin not in ("dense", "uniform")},
        front=[by_number[number] for number in front if number in by_number],
        guests=guests,
        limit=_bound(problem, cost),
        linear=own,
        method=None if cost not in problem.cost_model.measures or (how := problem.cost_model.measures[cost].method) == "exact" else how,
        spearman=[
            (_value(row, cost), row["measurements"]["spearman_held_out"]["value"])
            for row in rows
            if row["trial"] in front and "spearman_held_out" in row["measurements"]
        ],
    )


def _bound(problem: Problem, cost: str) -> float | None:
    """The tightest limit on a cost, counting limits on measures that rise and fall with it."""
    if cost not in problem.cost_model.measures:
        upper = [float(limit.bound) for limit in problem.limits if limit.name == cost and not limit.lower]
        return min(upper, default=None)
    wanted, bounds = problem.cost_model.measures[cost], []
    for limit in problem.cost_limits:
        form = problem.cost_model.measures[limit.name]
        if len(form.coefficients) == 1 and form.coefficients.keys() == wanted.coefficients.keys():
            (name,) = form.coefficients
            bounds.append(wanted.offset + wanted.coefficients[name] * (limit.bound - form.offset) / form.coefficients[name])
    return float(min(bounds)) if bounds else None


def _level_maps(space: SearchSpace, rows: Sequence[Row], summary: Row) -> list[dict[str, Any]]:
    """For every found configuration (else the closest) a grid of blocks by places, each cell its level."""
    wanted = {row["trial"]: row["point"] for row in summary["rows"] if row["role"] == "found"} or {summary["closest"]: "the closest"}
    stored = {row["trial"]: row for row in rows if row["trial"] in wanted}
    maps = []
    for number, title in wanted.items():
        if number is None:
            continue
        row = stored[number]
        indices = space.indices(row["configuration"])
        cells: dict[tuple[int, str], dict[str, Any]] = {}
        for decision, i, on in zip(space.decisions, indices, space.active(indices), strict=True):
            share = i / max(1, len(decision.levels) - 1)
            cells[decision.block, _place(decision)] = {
                "text": str(decision.levels[i]) if on else _NOTHING, "share": share if on else 0.0, "title": decision.key,
            }  # fmt: skip
        maps.append({"title": title, "trial": number, "digest": row["digest"], **_grid(space, cells)})
    return maps


def damage_maps(space: SearchSpace, damage: Mapping[str, Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """For every knob a grid of blocks by places and levels, each cell the quality lost by that level alone.

    Each is a title, `places`, and `blocks`: pairs of a block and its cells (None, or text, title, and share of the darkest on a
    logarithmic scale). `damage` is by decision key and level; None is a level that failed alone.
    """
    values = [value for levels in damage.values() for value in levels.values() if value is not None and value > 0]
    if not values:
        return []
    low, high = math.log(min(values)), math.log(max(values))

    def cell(name: str, value: float | None) -> dict[str, Any]:
        if value is None:
            return {"text": "fails", "share": 1.0, "title": f"{name}: fails"}
        share = (math.log(value) - low) / (high - low or 1) if value > 0 else 0.0
        return {"text": _short(value), "share": share, "title": f"{name}: {value:.3g}"}

    maps = []
    for knob in dict.fromkeys(decision.knob for decision in space.decisions):
        cells: dict[tuple[int, str], dict[str, Any]] = {}
        for decision in space.decisions:
            measured = damage.get(decision.key, {}) if decision.knob == knob else {}
            for level in decision.levels[1:]:
                if str(level) in measured:
                    cells[decision.block, f"{_inside(decision)} = {level}"] = cell(f"{decision.key} = {level}", measured[str(level)])
        if cells:
            maps.append({"title": knob, **_grid(space, cells)})
    return maps


def _grid(space: SearchSpace, cells: Mapping[tuple[int, str], dict[str, Any]]) -> dict[str, Any]:
    places = list(dict.fromkeys(place for _, place in cells))
    blocks = sorted({decision.block for decision in space.decisions})
    return {"places": places, "blocks": [(block, [cells.get((block, place)) for place in places]) for block in blocks]}


def _place(decision: Decision) -> str:
    """What a column of the level map is about: `self_attn.o_proj bits`."""
    return f"{_inside(decision)} {decision.knob}".rstrip()


def _inside(decision: Decision) -> str:
    """The site's path inside its block."""
    parts = decision.site.split(".")
    number = str(decision.block)
    return ".".join(parts[parts.index(number) + 1 :] if number in parts else parts)


def _failures(rows: Sequence[Row]) -> dict[str, Any]:
    failed = [row for row in rows if "failure" in row]
    return {
        "counts": Counter(row["failure"]["class"] for row in failed),
        "shown": failed[:_FAILURES_SHOWN],
        "more": max(0, len(failed) - _FAILURES_SHOWN),
    }


def _tokens(row: Row, quality: str) -> int | None:
    """Of the value; 1 where it is not taken on text."""
    measured = row["measurements"].get(quality)
    return None if measured is None else measured.get("tokens", 1)


def _value(row: Row, name: str) -> float:
    return float(row["trial"] if name == NUMBER else row["measurements"][name]["value"])


def _text(name: str, value: float | None) -> str:
    return _NOTHING if value is None else described(name).text(value)


def _short(value: float) -> str:
    """Two digits of a number, for a narrow cell: `.012`, `3e-5`."""
    text = f"{value:#.2g}" if value >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
    return text.removesuffix(".").removeprefix("0") or "0"


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_PAGES.filters["measured"] = lambda value, name: _text(name, value)
_PAGES.globals |= {"roles": _ROLES, "table_words": TABLE_WORDS}
