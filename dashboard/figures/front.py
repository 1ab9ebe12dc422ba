"""Quality over cost: every trial, the front, and the baselines and limits by which it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas, name_axes, pointed
from autoeff.dashboard.figures.labels import Mark, placed
from autoeff.dashboard.theme import MARKS, ROLES, Palette
from autoeff.dashboard.words import chart, figure

__all__ = ["Dot", "Guest", "draw_front"]

_MARGIN = 1.7
"""Factor below the least quality at which a logarithmic axis ends; the dense model, whose loss is zero, stands there."""
_SIZES = {"found": 17, "dense": 11, "expected": 15, "measured": 14}
_WIDTH, _AROUND = 460, 190
"""Of the plot in pixels where the page is narrow; and what axes and legend take of its height."""
_OURS = ("found", "measured", "expected")
_NAMED = ("dense", "uniform", "found", "expected")


@dataclass(frozen=True)
class Dot:
    """A trial: its number, who proposed it, what it costs and what it loses."""

    trial: int
    origin: str
    cost: float
    quality: float


@dataclass(frozen=True)
class Guest:
    """A configuration that is marked and named.

    Attributes:
        role: A key of `MARKS`.
        label: What is written beside it; may be somebody's own text.
    """

    role: str
    label: str
    trial: int
    cost: float
    quality: float


def draw_front(
    dots: Sequence[Dot],
    front: Sequence[Dot],
    guests: Sequence[Guest],
    palette: Palette,
    *,
    quality: str,
    cost: str,
    limit: float | None = None,
    method: str | None = None,
    linear: bool = False,
    revision: str = "",
    height: int = 460,
) -> go.Figure:
    """The chart.

    Args:
        dots: Trials measured on the whole search text.
        front: Those on the front, in any order.
        guests: Marked configurations.
        palette: Of the page.
        quality: Name of the measurement upwards.
        cost: Name of the one to the right.
        limit: Upper bound on the cost.
        method: How costs came about where they are not exact.
        linear: Whether values may be negative, so that the axis is no logarithm.
        revision: As of `canvas`.
        height: In pixels.
    """
    drawn = canvas(palette, height, revision)
    positive = [dot.quality for dot in (*dots, *front) if dot.quality > 0] + [g.quality for g in guests if g.quality > 0]
    floor = min(positive, default=1.0) / _MARGIN
    others = [dot for dot in dots if dot.origin not in ("dense", "uniform") and (linear or dot.quality > 0)]
    for name, colour, those in (
        ("other trials", palette.trial, [dot for dot in others if dot.origin != "searched"]),
        ("searched trials", palette.searched, [dot for dot in others if dot.origin == "searched"]),
    ):
        if those:
            marker = {"size": 5, "color": colour, "opacity": 0.65}
            drawn.add_trace(_dots(those, quality, cost, name=name, mode="markers", marker=marker))
    on_front = sorted((dot for dot in front if linear or dot.quality > 0), key=lambda dot: (dot.cost, -dot.quality))
    if on_front:
        line = {"color": palette.found, "width": 1.8, "shape": "hv"}
        marker = {"size": 6, "color": palette.found}
        drawn.add_trace(_dots(on_front, quality, cost, name="Pareto front", mode="lines+markers", line=line, marker=marker))
    marked = [guest if linear or guest.quality > 0 else replace(guest, quality=floor) for guest in guests]
    sides = _sides(marked, on_front, others, height, linear, limit)
    for role, title in ROLES.items():
        numbers = [i for i, guest in enumerate(guests) if guest.role == role]
        if not numbers:
            continue
        colour = palette.found if role in _OURS else palette.guest
        drawn.add_trace(
            go.Scatter(
                x=[marked[i].cost for i in numbers], y=[marked[i].quality for i in numbers], mode="markers+text", name=title,
                text=[chart(guests[i].label, 40) if sides[i] else "" for i in numbers],
                textposition=[sides[i] or "top center" for i in numbers],
                textfont={"size": 12, "color": palette.found if role in _OURS else palette.ink},
                marker={
                    "symbol": MARKS[role], "size": _SIZES.get(role, 9), "color": colour, "line": {"width": 1, "color": palette.page},
                },
                customdata=[
                    [guests[i].trial, chart(guests[i].label, 60), figure(cost, guests[i].cost), figure(quality, guests[i].quality)]
                    for i in numbers
                ],
                hovertemplate="%{customdata[1]}<br>trial %{customdata[0]}<br>"
                f"{chart(quality)} %{{customdata[3]}}<br>{chart(cost)} %{{customdata[2]}}<extra></extra>",
                cliponaxis=False,
            )
        )  # fmt: skip
    if limit is not None:
        drawn.add_vline(
            x=limit, line={"color": palette.guest, "width": 1.2, "dash": "dash"}, annotation_text="limit",
            annotation_font={"color": palette.guest, "size": 12}, annotation_position="top", annotation_yshift=2,
        )  # fmt: skip
    name_axes(drawn, cost, quality, method, linear=linear)
    return drawn


def _dots(dots: Sequence[Dot], quality: str, cost: str, **options: Any) -> go.Scatter:
    return go.Scatter(
        x=[dot.cost for dot in dots],
        y=[dot.quality for dot in dots],
        customdata=[[dot.trial, dot.origin] for dot in dots],
        hovertemplate="trial %{customdata[0]}, %{customdata[1]}<br>" + pointed(cost, quality) + "<extra></extra>",
        **options,
    )


def _sides(
    guests: Sequence[Guest], front: Sequence[Dot], others: Sequence[Dot], height: int, linear: bool, limit: float | None
) -> list[str | None]:
    """Where the names of guests stand: those of what was found first, then the others; None has no name, or no room for it."""
    if not guests:
        return []
    costs, qualities = ([getattr(one, name) for one in (*guests, *front, *others)] for name in ("cost", "quality"))
    frame = (min(costs), max([*costs, *([] if limit is None else [limit])]), min(qualities), max(qualities))
    order = sorted(range(len(guests)), key=lambda i: (guests[i].role not in _OURS, guests[i].role != "dense"))
    marks = [Mark(guests[i].cost, guests[i].quality, guests[i].label if guests[i].role in _NAMED else "") for i in order]
    marks += [Mark(dot.cost, dot.quality, "") for dot in front]
    sides = placed(marks, frame=frame, size=(_WIDTH, height - _AROUND), linear=linear, upright=limit)
    chosen = [side or ("bottom center" if guests[i].role in _OURS else None) for i, side in zip(order, sides, strict=False)]
    return [side for _, side in sorted(zip(order, chosen, strict=True), key=lambda pair: pair[0])]
