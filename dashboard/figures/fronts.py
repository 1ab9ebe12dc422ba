"""Fronts of several jobs over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas, name_axes, pointed
from autoeff.dashboard.theme import Palette
from autoeff.dashboard.words import chart

__all__ = ["draw_fronts"]

_DASHES = ("solid", "dash", "dot")
"""What lies over each other is seen through the gaps."""


def draw_fronts(
    fronts: Mapping[str, Sequence[tuple[float, float, int]]],
    palette: Palette,
    *,
    quality: str,
    cost: str,
    method: str | None = None,
    linear: bool = False,
    revision: str = "",
) -> go.Figure:
    """Steps, one for each job; `fronts` holds (cost, quality, trial) by the job's name."""
    drawn = canvas(palette, 480, revision)
    for number, (name, points) in enumerate(fronts.items()):
        shown = [point for point in points if linear or point[1] > 0]
        colour, dash = palette.runs[number % len(palette.runs)], _DASHES[(number + number // len(palette.runs)) % len(_DASHES)]
        drawn.add_trace(
            go.Scatter(
                x=[x for x, _, _ in shown], y=[y for _, y, _ in shown], mode="lines+markers", name=chart(name, 80),
                line={"color": colour, "width": 1.8, "shape": "hv", "dash": dash}, marker={"size": 6},
                customdata=[[trial] for _, _, trial in shown],
                hovertemplate=f"trial %{{customdata[0]}}<br>{pointed(cost, quality)}<extra>{chart(name, 40)}</extra>",
            )
        )  # fmt: skip
    name_axes(drawn, cost, quality, method, linear=linear)
    return drawn
