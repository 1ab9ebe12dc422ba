"""What all charts have in common."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import plotly.graph_objects as go

from autoeff.dashboard.theme import Palette
from autoeff.dashboard.words import axis, chart
from autoeff.spaces.measurements import described

# Plotly looks into pandas as soon as any thread has begun to import it; here that is waited for.
import_module("pandas")

__all__ = ["canvas", "logarithmic", "name_axes", "pointed", "scale"]

_FONT = '"Source Sans", "Source Sans Pro", system-ui, -apple-system, "Segoe UI", sans-serif'


def canvas(palette: Palette, height: int, revision: str) -> go.Figure:
    """An empty chart.

    Args:
        palette: Of the page that it stands on.
        height: In pixels.
        revision: Zoom and hidden traces stay as the reader set them while this is the same.
    """
    both: dict[str, Any] = {
        "gridcolor": palette.line, "linecolor": palette.line, "zeroline": False, "automargin": True, "title": {"standoff": 8},
        "tickfont": {"color": palette.muted, "size": 12}, "title_font": {"color": palette.ink, "size": 13},
    }  # fmt: skip
    return go.Figure(
        layout={
            "height": height,
            "uirevision": revision,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": _FONT, "size": 13, "color": palette.ink},
            "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
            "xaxis": both,
            "yaxis": both,
            "legend": {
                "orientation": "h", "x": 0, "y": 0, "yref": "container", "xanchor": "left", "yanchor": "bottom",
                "font": {"size": 12, "color": palette.muted},
                "itemsizing": "constant", "bgcolor": "rgba(0,0,0,0)",
            },
            "hoverlabel": {"bgcolor": palette.page, "bordercolor": palette.line, "font": {"color": palette.ink, "size": 12}},
            "hovermode": "closest",
            "dragmode": "zoom",
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": palette.muted, "activecolor": palette.ink},
        }
    )  # fmt: skip


def logarithmic(values: Iterable[float], tickformat: str = "~g") -> dict[str, Any]:
    """An axis for positive values by powers of ten: a line for each, and for 2 and 5 between where there are few."""
    positive = [value for value in values if value > 0]
    narrow = bool(positive) and max(positive) < 300 * min(positive)
    return {"type": "log", "tickformat": tickformat, "dtick": "D2" if narrow else 1, "minor": {"showgrid": False}}


def scale(name: str) -> dict[str, Any]:
    """How an axis writes the values of a measurement: bytes with their prefixes, counts whole."""
    unit = described(name).unit if name != "trial" else ""
    if unit.startswith("bytes"):
        return {"tickformat": "~s", "ticksuffix": "B"}
    if unit.startswith("FLOP"):
        return {"tickformat": "~s", "ticksuffix": "FLOP"}
    return {}


def name_axes(drawn: go.Figure, cost: str, quality: str, method: str | None, *, linear: bool) -> None:
    """Writes what the axes of quality over a cost are, by powers of ten unless `linear`."""
    drawn.update_xaxes(title_text=axis(cost, method), **scale(cost))
    values = [value for trace in drawn.data for value in trace.y]
    drawn.update_yaxes(title_text=axis(quality), **({} if linear else logarithmic(values)))


def pointed(cost: str, quality: str) -> str:
    """What a pointer is told of a point of quality over a cost."""
    prefixed = "s" if scale(cost) else "g"
    return f"{chart(quality)} %{{y:.4~g}}<br>{chart(cost)} %{{x:.4~{prefixed}}}{scale(cost).get('ticksuffix', '')}"
