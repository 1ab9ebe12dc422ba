"""How much a search has found by then: the share of the picture that its front dominates, over trials or time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas
from autoeff.dashboard.theme import Palette
from autoeff.search.pareto import Archive, hypervolume

__all__ = ["Step", "draw_progress", "steps_of"]


@dataclass(frozen=True)
class Step:
    """What was dominated after a trial.

    Attributes:
        at: Number of the trial, or seconds.
        share: From 0 to 1.
    """

    at: float
    share: float


def steps_of(points: Sequence[tuple[float, float, float]], *, linear: bool = False) -> list[Step]:
    """The dominated share after each point that raised it.

    The box reaches from the least to the largest cost and quality among the points; a quality counts by its logarithm, as it is drawn,
    unless `linear`.

    Args:
        points: (at, cost, quality) by rising `at`. What has no place in the picture is left out.
        linear: Whether values may be negative.
    """
    placed = [(at, cost, value if linear else log10(value)) for at, cost, value in points if linear or value > 0]
    if not placed:
        return []
    least = min(cost for _, cost, _ in placed), min(value for _, _, value in placed)
    most = max(cost for _, cost, _ in placed), max(value for _, _, value in placed)
    # a little beyond the worst, so that what is worst in one of both counts for the other
    reference = tuple(high + 0.02 * (high - low or 1.0) for low, high in zip(least, most, strict=True))
    area = (reference[0] - least[0]) * (reference[1] - least[1])
    archive, steps = Archive(), []
    for number, (at, cost, value) in enumerate(placed):
        if archive.add((cost, value), number):
            steps.append(Step(at, hypervolume(archive.points, (reference[0], reference[1])) / area))
    return [*steps, Step(placed[-1][0], steps[-1].share)]


def draw_progress(steps: Sequence[Step], palette: Palette, *, title: str, revision: str = "", height: int = 460) -> go.Figure:
    """The chart; `title` is of the axis to the right: trials, or a time with its unit."""
    figure = canvas(palette, height, revision)
    figure.add_trace(
        go.Scatter(
            x=[step.at for step in steps], y=[step.share for step in steps], mode="lines", name="dominated",
            line={"color": palette.found, "width": 2, "shape": "hv"}, showlegend=False,
            hovertemplate="%{x:.4~g}: %{y:.1%}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text=title, rangemode="tozero")
    figure.update_yaxes(title_text="dominated share of the picture", tickformat=".0%", range=[0, 1.02])
    return figure
