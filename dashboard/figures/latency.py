"""Predicted against measured times of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas
from autoeff.dashboard.theme import MARKS, ROLES, Palette
from autoeff.dashboard.words import chart

__all__ = ["Timed", "draw_latency"]


@dataclass(frozen=True)
class Timed:
    """A model that was timed end to end.

    Attributes:
        role: A key of `MARKS`.
        name: Which time: `decode_ms` or `prefill_ms`.
        spread: Half the distance of the quartiles, in milliseconds.
    """

    role: str
    label: str
    name: str
    predicted_ms: float
    measured_ms: float
    spread_ms: float


def draw_latency(timed: Sequence[Timed], palette: Palette, *, revision: str = "") -> go.Figure:
    """Dots by role; on the line a prediction is right."""
    drawn = canvas(palette, 360, revision)
    low = min(min(t.predicted_ms, t.measured_ms) for t in timed)
    high = max(max(t.predicted_ms, t.measured_ms) for t in timed)
    drawn.add_trace(
        go.Scatter(
            x=[0.8 * low, 1.25 * high], y=[0.8 * low, 1.25 * high], mode="lines", name="as predicted",
            line={"color": palette.muted, "width": 1, "dash": "dot"}, hoverinfo="skip",
        )
    )  # fmt: skip
    for role in ROLES:
        those = [t for t in timed if t.role == role]
        if not those:
            continue
        drawn.add_trace(
            go.Scatter(
                x=[t.measured_ms for t in those], y=[t.predicted_ms for t in those], mode="markers", name=ROLES[role],
                error_x={"type": "data", "array": [t.spread_ms for t in those], "color": palette.muted, "thickness": 1},
                marker={
                    "symbol": MARKS[role], "size": 11, "color": palette.found if role == "found" else palette.guest,
                    "line": {"width": 1, "color": palette.page},
                },
                customdata=[[chart(t.label, 60), t.name, t.predicted_ms / t.measured_ms - 1] for t in those],
                hovertemplate="%{customdata[0]}, %{customdata[1]}<br>measured %{x:.3g} ms<br>predicted %{y:.3g} ms"
                " (%{customdata[2]:+.1%})<extra></extra>",
            )
        )  # fmt: skip
    drawn.update_xaxes(title_text="measured, ms", type="log")
    drawn.update_yaxes(title_text="predicted, ms", type="log")
    return drawn
