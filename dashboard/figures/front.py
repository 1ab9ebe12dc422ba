"""Quality over cost: every trial, the front, and the baselines and limits by which it is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas, name_axes
from autoeff.dashboard.theme import MARKS, ROLES, Palette
from autoeff.dashboard.words import chart, figure

__all__ = ["Dot", "Guest", "draw_front"]

_MARGIN = 1.7
"""Factor below the least quality at which a logarithmic axis ends; the dense model, whose loss is zero, stands there."""
_SIZES = {"found": 17, "dense": 11, "expected": 15, "measured": 14}
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
    chartable = canvas(palette, height, revision)
    positive = [dot.quality for dot in (*dots, *front) if dot.quality > 0] + [g.quality for g in guests if g.quality > 0]
    floor = min(positive, default=1.0) / _MARGIN
    by_origin: dict[str, list[Dot]] = {}
    for dot in dots:
        if dot.origin not in ("dense", "uniform") and (linear or dot.quality > 0):
            by_origin.setdefault(dot.origin, []).append(dot)
    for origin, found in by_origin.items():
        colour = palette.origins.get(origin, palette.origins["searched"])
        chartable.add_trace(
            _dots(found, quality, cost, name=f"{origin} trials", mode="markers", marker={"size": 5, "color": colour, "opacity": 0.6})
        )
    on_front = sorted((dot for dot in front if linear or dot.quality > 0), key=lambda dot: (dot.cost, -dot.quality))
    if on_front:
        line = {"color": palette.found, "width": 1.8, "shape": "hv"}
        marker = {"size": 6, "color": palette.found}
        chartable.add_trace(_dots(on_front, quality, cost, name="Pareto front", mode="lines+markers", line=line, marker=marker))
    farthest = max((g.cost for g in guests), default=0.0)
    for role, those in _by_role(guests).items():
        shown = [g.quality if linear or g.quality > 0 else floor for g in those]
        colour = palette.found if role in _OURS else palette.guest
        chartable.add_trace(
            go.Scatter(
                x=[g.cost for g in those], y=shown, mode="markers+text", name=ROLES[role],
                text=[chart(g.label, 40) if role in _NAMED else "" for g in those],
                textposition=[_beside(g, role, farthest) for g in those],
                textfont={"size": 11, "color": palette.found if role in _OURS else palette.ink},
                marker={
                    "symbol": MARKS[role], "size": _SIZES.get(role, 9), "color": colour, "line": {"width": 1, "color": palette.page},
                },
                customdata=[[g.trial, chart(g.label, 60), figure(cost, g.cost), figure(quality, g.quality)] for g in those],
                hovertemplate="%{customdata[1]}<br>trial %{customdata[0]}<br>" + _values(quality, cost) + "<extra></extra>",
                cliponaxis=False,
            )
        )  # fmt: skip
    if limit is not None:
        chartable.add_vline(
            x=limit, line={"color": palette.guest, "width": 1.2, "dash": "dash"}, annotation_text="limit",
            annotation_font={"color": palette.guest, "size": 11}, annotation_position="top right",
        )  # fmt: skip
    name_axes(chartable, cost, quality, method, linear=linear)
    return chartable


def _dots(dots: Sequence[Dot], quality: str, cost: str, **options: Any) -> go.Scatter:
    return go.Scatter(
        x=[dot.cost for dot in dots],
        y=[dot.quality for dot in dots],
        customdata=[[dot.trial, dot.origin, figure(cost, dot.cost), figure(quality, dot.quality)] for dot in dots],
        hovertemplate="trial %{customdata[0]}, %{customdata[1]}<br>" + _values(quality, cost) + "<extra></extra>",
        **options,
    )


def _values(quality: str, cost: str) -> str:
    return f"{chart(quality)} %{{customdata[3]}}<br>{chart(cost)} %{{customdata[2]}}"


def _beside(guest: Guest, role: str, farthest: float) -> str:
    """Where a name stands: what was found lies on the front and has room below, the right edge has room to its left."""
    if role in _OURS:
        return "bottom center"
    if role != "uniform":
        return "top center"
    return "top left" if guest.cost > 0.85 * farthest else "top right"


def _by_role(guests: Sequence[Guest]) -> Mapping[str, list[Guest]]:
    return {role: those for role in ROLES if (those := [guest for guest in guests if guest.role == role])}
