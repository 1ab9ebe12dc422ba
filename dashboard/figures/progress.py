"""What a search has found by then, over trials or time: its best, or the share of the picture that its front dominates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas
from autoeff.dashboard.theme import Palette
from autoeff.dashboard.words import axis, chart
from autoeff.search.pareto import Archive, hypervolume

__all__ = ["Step", "bests_of", "draw_best", "draw_progress", "steps_of"]

_CLOSE = 5.0
"""Times the best that is drawn: what is worse is passed in the first steps."""
_HEIGHT = 446


@dataclass(frozen=True)
class Step:
    """What was found after a trial.

    Attributes:
        at: Number of the trial, or a time.
        value: A quality, or a share from 0 to 1.
    """

    at: float
    value: float


def bests_of(points: Sequence[tuple[float, float]]) -> list[Step]:
    """The least quality after each point that lowered it; `points` are (at, quality) by rising `at`."""
    steps: list[Step] = []
    for at, value in points:
        if not steps or value < steps[-1].value:
            steps.append(Step(at, value))
    return [*steps, Step(points[-1][0], steps[-1].value)] if steps else []


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
    return [*steps, Step(placed[-1][0], steps[-1].value)]


def draw_best(
    steps: Sequence[Step], rivals: Mapping[str, float], palette: Palette, *, quality: str, title: str, linear: bool, revision: str
) -> go.Figure:
    """The best quality over trials or time, which `title` says with its unit, and the baselines to be beaten by name."""
    least = min([step.value for step in steps] + list(rivals.values()))
    highest = max(step.value for step in steps)
    if not linear:
        highest = min(highest, _CLOSE * least)
    drawn = _stairs(steps, palette, "best so far", title, "%{y:.4~g}", revision)
    for name, value in rivals.items():
        if value <= highest:
            drawn.add_hline(
                y=value, line={"color": palette.guest, "width": 1.2, "dash": "dash"}, annotation_text=chart(name, 40),
                annotation_font={"color": palette.guest, "size": 12}, annotation_position="top left",
            )  # fmt: skip
    room = 0.15 * ((highest - least) or abs(highest) or 1.0)
    drawn.update_yaxes(title_text=f"best {axis(quality)}", range=[least - room, highest + room])
    return drawn


def draw_progress(steps: Sequence[Step], palette: Palette, *, title: str, revision: str) -> go.Figure:
    """The dominated share over trials or time, which `title` says with its unit."""
    drawn = _stairs(steps, palette, "dominated", title, "%{y:.1%}", revision)
    drawn.update_yaxes(title_text="dominated share of the picture", tickformat=".0%", range=[0, 1.02])
    return drawn


def _stairs(steps: Sequence[Step], palette: Palette, name: str, title: str, shown: str, revision: str) -> go.Figure:
    drawn = canvas(palette, _HEIGHT, revision)
    drawn.add_trace(
        go.Scatter(
            x=[step.at for step in steps], y=[step.value for step in steps], mode="lines", name=name,
            line={"color": palette.found, "width": 2, "shape": "hv"}, showlegend=False,
            hovertemplate=f"{title} %{{x:.4~g}}: {shown}<extra></extra>",
        )
    )  # fmt: skip
    drawn.update_xaxes(title_text=title, rangemode="tozero")
    return drawn
