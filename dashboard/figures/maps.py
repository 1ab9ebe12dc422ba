"""Maps of layers by knobs: the level that stands at each place, or the harm that each level did alone."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autoeff.dashboard.figures.canvas import canvas
from autoeff.dashboard.layers import Grid
from autoeff.dashboard.theme import Palette, mixed
from autoeff.dashboard.words import chart

__all__ = ["draw_damage", "draw_levels"]

_HIGH, _WIDE = 26, 46
"""Pixels of a cell."""
_FEW = 4
"""Places of a map that would only be stretched by the width of a page."""
_TOP, _LEFT = 110, 90
"""Pixels for the names around the cells."""
_SHARES = {"light": (0.06, 0.72), "dark": (0.06, 0.45)}
"""Of a knob's colour in a cell, from dense to the strongest level, on which ink can still be read."""
_LETTER = 6
"""Pixels that a letter of a slanted name takes downwards."""


def draw_levels(grids: Sequence[Grid], palette: Palette, *, revision: str = "") -> go.Figure:
    """Levels: each knob in its own colour, the stronger the further from dense."""
    ends = [[mixed(palette.page, palette.knob(grid.knob), share) for share in _SHARES[palette.name]] for grid in grids]
    drawn = _draw(grids, palette, revision, ends).update_traces(textfont_color=palette.ink)
    cells = sum(len(grid.places) for grid in grids)
    return drawn if cells > _FEW else drawn.update_layout(width=_LEFT + 2 * _WIDE * cells)


def draw_damage(grid: Grid, palette: Palette, *, revision: str = "") -> go.Figure:
    """Harm: the darker (on a dark page the brighter) the worse; as wide as its cells need."""
    drawn = _draw([grid], palette, revision, [palette.harm])
    return drawn.update_layout(width=_LEFT + _WIDE * len(grid.places))


def _draw(grids: Sequence[Grid], palette: Palette, revision: str, scales: Sequence[Sequence[str]]) -> go.Figure:
    figure = make_subplots(
        rows=1, cols=len(grids), shared_yaxes=True, horizontal_spacing=0.012, column_widths=[max(2, len(grid.places)) for grid in grids],
        subplot_titles=[chart(grid.knob or "decisions", 40) for grid in grids],
    )  # fmt: skip
    longest = max(len(name) for grid in grids for name in grid.names.values())
    figure.update_layout(canvas(palette, _TOP + _LETTER * longest + _HIGH * len(grids[0].blocks), revision).layout.to_plotly_json())
    for number, (grid, colours) in enumerate(zip(grids, scales, strict=True), start=1):
        cells = [[grid.cells.get((block, place)) for place in grid.places] for block in grid.blocks]
        names = [[chart(grid.names.get(part, part), 60) for part in parts] for parts in zip(*grid.places, strict=True)]
        figure.add_trace(
            go.Heatmap(
                z=[[None if cell is None else cell.share for cell in row] for row in cells],
                text=[["" if cell is None else chart(cell.text, 12) for cell in row] for row in cells],
                customdata=[["" if cell is None else chart(cell.title, 200) for cell in row] for row in cells],
                x=names[0] if len(names) == 1 else names,
                y=[str(block) for block in grid.blocks],
                texttemplate="%{text}",
                textfont={"size": 11},
                hovertemplate="%{customdata}<extra></extra>",
                hoverongaps=False,
                colorscale=[[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)],
                zmin=0,
                zmax=1,
                showscale=False,
                xgap=1.5,
                ygap=1.5,
            ),
            row=1,
            col=number,
        )
        nested = len(names) > 1
        figure.update_xaxes(type="multicategory" if nested else "category", tickangle=0 if nested else -60, row=1, col=number)
    plain = {"showgrid": False, "ticks": "", "linecolor": "rgba(0,0,0,0)", "tickfont": {"size": 11, "color": palette.muted}}
    figure.update_xaxes(automargin=True, dividercolor=palette.line, **plain)
    figure.update_yaxes(autorange="reversed", type="category", automargin=True, **plain)
    figure.update_yaxes(title_text="block", row=1, col=1)
    figure.update_annotations(font={"size": 13, "color": palette.ink}, yshift=4)
    return figure
