"""What each block saves of a cost, by knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas, scale
from autoeff.dashboard.theme import Palette
from autoeff.dashboard.words import axis, chart, figure

__all__ = ["draw_blocks"]


def draw_blocks(
    saved: Mapping[str, Mapping[int, float]],
    blocks: Sequence[int],
    palette: Palette,
    *,
    cost: str,
    method: str | None = None,
    revision: str = "",
) -> go.Figure:
    """Bars over blocks, one part for each knob; `saved` is by knob and block."""
    drawn = canvas(palette, 320, revision)
    for knob, found in saved.items():
        numbers = sorted(found)
        drawn.add_trace(
            go.Bar(
                x=numbers, y=[found[block] for block in numbers], name=chart(knob or "decisions", 40),
                marker={"color": palette.knob(knob)}, width=0.75,
                customdata=[figure(cost, found[block]) for block in numbers],
                hovertemplate=f"block %{{x}}<br>{chart(knob, 40)} saves %{{customdata}}<extra></extra>",
            )
        )  # fmt: skip
    drawn.update_layout(barmode="relative", bargap=0.25)
    drawn.update_xaxes(
        title_text="block", dtick=1 if len(blocks) <= 32 else None, showgrid=False, range=[blocks[0] - 0.6, blocks[-1] + 0.6]
    )
    drawn.update_yaxes(title_text=f"saved {axis(cost, method)}", **scale(cost))
    return drawn
