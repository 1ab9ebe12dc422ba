"""Measured operations under the roof of the fastest that was seen."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas, logarithmic
from autoeff.dashboard.plant import Operation
from autoeff.dashboard.theme import Palette
from autoeff.dashboard.words import chart

__all__ = ["draw_roofline"]

_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down")


def draw_roofline(operations: Sequence[Operation], palette: Palette, *, revision: str = "") -> go.Figure:
    """Operations per second over operations per byte; the roof is the highest bandwidth and the highest speed among them."""
    drawn = canvas(palette, 440, revision)
    bandwidth = max(one.bytes / one.seconds for one in operations)
    peak = max(one.flops / one.seconds for one in operations)
    xs = [one.flops / one.bytes for one in operations]
    low, high, ridge = min(*xs, peak / bandwidth) / 1.5, max(*xs, peak / bandwidth) * 1.5, peak / bandwidth
    drawn.add_trace(
        go.Scatter(
            x=[low, ridge, high], y=[low * bandwidth, peak, peak], mode="lines", name="the fastest seen",
            line={"color": palette.muted, "width": 1.2, "dash": "dot"}, hoverinfo="skip",
        )
    )  # fmt: skip
    for number, kind in enumerate(sorted({one.kind for one in operations}, key=lambda kind: (kind != "dense", kind))):
        those = [one for one in operations if one.kind == kind]
        drawn.add_trace(
            go.Scatter(
                x=[one.flops / one.bytes for one in those], y=[one.flops / one.seconds for one in those], mode="markers", name=chart(kind),
                marker={
                    "size": 7, "color": palette.runs[number % len(palette.runs)], "symbol": _SYMBOLS[number % len(_SYMBOLS)],
                    "opacity": 0.8,
                },
                customdata=[[chart(one.name), one.seconds * 1e6] for one in those],
                hovertemplate="%{customdata[0]}<br>%{customdata[1]:.4g} µs<br>%{y:.3s}FLOP/s<extra></extra>",
            )
        )  # fmt: skip
    drawn.update_xaxes(title_text="FLOP per byte moved", **logarithmic(xs))
    drawn.update_yaxes(title_text="FLOP/s", **logarithmic([one.flops / one.seconds for one in operations], "~s"))
    return drawn
