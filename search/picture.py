"""The picture of a search: quality against cost, with the baselines that every search is judged by."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from autoeff.spaces.measurements import described

__all__ = ["Guest", "Picture", "draw_damage", "draw_fronts", "draw_png", "draw_svg"]

_INK = {"ink": "#1c2330", "muted": "#6b7382", "line": "#d9dee7", "found": "#1d63d8", "guest": "#b4531a"}
"""Colours on white. In the SVG each stands for a CSS variable of the same name, so that the page can turn dark."""
_ORIGINS = {"table": "#9aa3b2", "random": "#c9b458", "additive": "#57a773", "seed": "#5aa9b8", "searched": "#6f9ceb", "given": "#b08cc9"}
_LABELS = {"dense": ((-7, 6), "right"), "uniform": ((7, 6), "left"), "additive": ((-8, -13), "right"), "found": ((8, -13), "left")}
"""Where names stand: what lies on a front has room below it, on the side where nothing is better."""
_MARKS = {"dense": "P", "uniform": "s", "additive": "D", "seed": "v", "random": "^", "found": "*"}
_RUNS = (_INK["found"], _INK["guest"], "#2e8b57", "#8e44ad", "#b8860b", _INK["muted"])
_DASHES = ("solid", "dashed", "dotted")
"""Runs in one picture: colours, and dashes where there are more runs than colours."""
_HARM = LinearSegmentedColormap.from_list("harm", ["white", "#f6d7c3", _INK["guest"], "#5a2408"])
_DARK = 0.6
"""Share of the darkest colour from which text is white."""
_MARGIN = 1.7
"""Factor below the least quality at which the axis ends."""
_SIZES = {"found": 190, "dense": 70}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "autoeff",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK["ink"],
    "axes.labelcolor": _INK["ink"],
    "axes.edgecolor": _INK["muted"],
    "xtick.color": _INK["muted"],
    "ytick.color": _INK["muted"],
    "xtick.labelcolor": _INK["ink"],
    "ytick.labelcolor": _INK["ink"],
}


@dataclass(frozen=True)
class Guest:
    """A configuration that is marked and named.

    Attributes:
        role: dense, uniform, additive, seed, random or found.
        quality: On the search text; 0 for the dense model.
    """

    role: str
    label: str
    cost: float
    quality: float | None
    spearman: float | None = None


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        quality: Name of the measurement on the logarithmic axis.
        cost: Name of the measurement on the other one.
        points: (cost, quality) of every trial by origin.
        front: (cost, quality) of the trials on the Pareto front.
        limit: Upper bound on the cost, None where the job has none on it.
        linear: Whether the quality stands on a linear axis instead: the user's own metrics may be negative, or larger the better.
        method: How costs came about, where they are not exact.
    """

    quality: str
    cost: str
    points: Mapping[str, Sequence[tuple[float, float]]]
    front: Sequence[tuple[float, float]]
    guests: Sequence[Guest]
    limit: float | None = None
    spearman: Sequence[tuple[float, float]] = field(default=())
    linear: bool = False
    method: str | None = None


def draw_png(picture: Picture) -> bytes:
    """The picture on white, 1,600 pixels wide."""
    return _saved(picture, "png", dpi=160, facecolor="white")


def draw_svg(picture: Picture) -> str:
    """The picture for inclusion in a page: transparent, its colours as CSS variables `--ink`, `--muted`, `--line`, `--found`, `--guest`."""
    text = _saved(picture, "svg", transparent=True, metadata={"Date": None, "Creator": None}).decode()
    for name, colour in _INK.items():
        text = text.replace(colour, f"var(--{name})")
    return text[text.index("<svg") :]


def draw_fronts(
    quality: str, cost: str, fronts: Mapping[str, Sequence[tuple[float, float]]], *, linear: bool = False, method: str | None = None
) -> bytes:
    """Fronts over each other as a PNG on white, 1,600 pixels wide.

    Args:
        quality: Name of the measurement on the logarithmic axis.
        cost: Name of the measurement on the other one.
        fronts: (cost, quality) by name of the run; what is not above zero has no place on a logarithmic axis.
        linear: As of a `Picture`.
        method: Likewise.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        axes = figure.subplots()
        _clean(axes)
        if not linear:
            axes.set_yscale("log")
        for i, (name, points) in enumerate(fronts.items()):
            if shown := sorted(points if linear else _positive(points)):
                xs, ys = zip(*shown, strict=True)
                colour, dash = _RUNS[i % len(_RUNS)], _DASHES[i // len(_RUNS) % len(_DASHES)]
                axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.4, drawstyle="steps-post", marker=".", markersize=6, label=name)
        axes.set_ylabel(_label(quality))
        _label_cost(axes, cost, method)
        if axes.lines:
            axes.legend(loc="upper right", frameon=False, fontsize=8.5)
        return _png(figure)


def draw_damage(title: str, maps: Sequence[Mapping[str, Any]]) -> bytes:
    """Grids of blocks by places as a PNG on white, one below the other, the more harm the darker.

    Args:
        title: Above all of them.
        maps: From `report.damage_maps`.
    """
    columns, rows = max(len(m["places"]) for m in maps), sum(len(m["blocks"]) for m in maps)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2 + 0.5 * columns, 0.6 + 0.26 * rows + 2.4 * len(maps)), layout="constrained")
        figure.suptitle(title, fontsize=10)
        grids = figure.subplots(len(maps), 1, squeeze=False, height_ratios=[len(m["blocks"]) + 1 for m in maps])[:, 0]
        for axes, grid in zip(grids, maps, strict=True):
            cells = [[None if cell is None else cell["share"] for cell in row] for _, row in grid["blocks"]]
            axes.imshow(
                [[math.nan if share is None else share for share in row] for row in cells], cmap=_HARM, vmin=0, vmax=1, aspect="auto"
            )
            for y, (_, row) in enumerate(grid["blocks"]):
                for x, cell in enumerate(row):
                    if cell is not None:
                        ink = "white" if cell["share"] > _DARK else _INK["ink"]
                        axes.text(x, y, cell["text"], ha="center", va="center", fontsize=6.5, color=ink)
            axes.set_xlim(-0.5, columns - 0.5)  # cells of one width in every grid
            axes.set_title(grid["title"], loc="left", fontsize=10)
            axes.set_ylabel("block")
            axes.set_yticks(range(len(cells)), [str(block) for block, _ in grid["blocks"]], fontsize=7)
            axes.set_xticks(range(len(grid["places"])), grid["places"], rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def _saved(picture: Picture, form: str, **options: Any) -> bytes:
    with matplotlib.rc_context(_STYLE):
        ranked = any(guest.spearman is not None for guest in picture.guests)
        figure = Figure(figsize=(10, 7.6 if ranked else 5.6), layout="constrained")
        if ranked:
            upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
            _draw_spearman(lower, picture)
            _label_cost(lower, picture.cost, picture.method)
        else:
            upper = figure.subplots()
            _label_cost(upper, picture.cost, picture.method)
        _draw_quality(upper, picture)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, **options)
        return buffer.getvalue()


def _draw_quality(axes: Axes, picture: Picture) -> None:
    _clean(axes)
    shown_of = list if picture.linear else _positive
    if not picture.linear:
        axes.set_yscale("log")
    for origin, points in picture.points.items():
        if shown := shown_of(points):
            colour = _ORIGINS.get(origin, _ORIGINS["searched"])
            axes.scatter(
                [x for x, _ in shown], [y for _, y in shown], s=11, color=colour, alpha=0.45, linewidths=0, label=f"{origin} trials",
                rasterized=True, zorder=2,
            )  # fmt: skip
    if front := sorted(shown_of(picture.front)):
        xs, ys = zip(*front, strict=True)
        axes.plot(xs, ys, color=_INK["found"], linewidth=1.4, drawstyle="steps-post", label="Pareto front", zorder=3)
        axes.scatter(xs, ys, s=16, color=_INK["found"], linewidths=0, zorder=4)
    if picture.limit is not None:
        axes.axvline(picture.limit, color=_INK["guest"], linewidth=1.1, linestyle=(0, (5, 3)), label="limit", zorder=1)
    seen: set[str] = set()
    drawn = [point for points in picture.points.values() for point in points]
    lowest = min((y for _, y in _positive([*drawn, *picture.front, *((g.cost, g.quality or 0.0) for g in picture.guests)])), default=1.0)
    floor = lowest / _MARGIN
    for guest in picture.guests:
        if guest.quality is None:
            continue
        on_floor = guest.quality <= 0 and not picture.linear  # a logarithmic axis has no zero: the dense model stands on its lower edge
        axes.scatter(
            [guest.cost], [floor if on_floor else guest.quality], marker=_MARKS[guest.role], s=_SIZES.get(guest.role, 46),
            color=_INK["found" if guest.role == "found" else "guest"], edgecolors="white", linewidths=0.8, zorder=6,
            clip_on=not on_floor, label=None if guest.role in seen else guest.label if guest.role == "dense" else _ROLE_WORDS[guest.role],
        )  # fmt: skip
        seen.add(guest.role)
        if guest.role in _LABELS:
            offset, side = _LABELS[guest.role]
            axes.annotate(
                guest.label, (guest.cost, floor if on_floor else guest.quality), xytext=offset, textcoords="offset points", ha=side,
                fontsize=8.5, color=_INK["found" if guest.role == "found" else "ink"], zorder=7,
            )  # fmt: skip
    if not picture.linear:
        axes.set_ylim(bottom=floor)
    axes.set_ylabel(_label(picture.quality))
    for handle in axes.legend(loc="best" if picture.linear else "upper right", frameon=False, fontsize=8.5, ncols=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _draw_spearman(axes: Axes, picture: Picture) -> None:
    _clean(axes)
    if line := sorted(picture.spearman):
        axes.plot(*zip(*line, strict=True), color=_INK["found"], linewidth=1.4, marker=".", zorder=3)
    for guest in picture.guests:
        if guest.spearman is None:
            continue
        axes.scatter(
            [guest.cost], [guest.spearman], marker=_MARKS[guest.role], s=_SIZES.get(guest.role, 46),
            color=_INK["found" if guest.role == "found" else "guest"], edgecolors="white", linewidths=0.8, zorder=4,
        )  # fmt: skip
    axes.set_ylabel("Spearman, held out")


def _label_cost(axes: Axes, cost: str, method: str | None = None) -> None:
    label = _label(cost) if described(cost).unit != "bytes" else cost
    axes.set_xlabel(label if method is None else f"{label} ({method})")
    if described(cost).unit.startswith(("bytes", "FLOP")):
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: described(cost).text(value)))


def _label(name: str) -> str:
    return f"{name}, {unit}" if (unit := described(name).unit) else name


def _clean(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(color=_INK["line"], linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _positive(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y > 0]


_ROLE_WORDS = {
    "dense": "dense", "uniform": "uniform levels", "additive": "additive optimum", "seed": "published rules",
    "random": "best of random", "found": "found",
}  # fmt: skip
