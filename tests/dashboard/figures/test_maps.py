"""Maps of layers by knobs."""

from __future__ import annotations

from typing import Any

from autoeff.dashboard.figures.maps import draw_damage, draw_levels
from autoeff.dashboard.layers import damage_grids, grids_of
from autoeff.dashboard.theme import DARK, LIGHT


def test_each_knob_has_its_part_and_its_colour(ground: Any, shown: Any) -> None:
    grids = grids_of(ground, shown.best.configuration)
    drawn = draw_levels(grids, LIGHT)
    parts = {grid.knob: trace for grid, trace in zip(grids, drawn.data, strict=True)}
    skip, bits = parts["skip"], parts["bits"]
    assert (len(skip.x), len(bits.x), len(bits.y)) == (2, 4, 8)
    level = shown.best.configuration["model.layers.3.mlp.down_proj:bits"]
    assert bits.text[3][list(bits.x).index("down")] == str(level)
    assert bits.colorscale[1][1] != skip.colorscale[1][1]
    assert drawn.layout.yaxis.autorange == "reversed"


def test_damage_is_the_table(ground: Any, shown: Any) -> None:
    (grid,) = (grid for grid in damage_grids(ground, shown.result["table"]["damage"]) if grid.knob == "bits")
    drawn = draw_damage(grid, DARK)
    places, levels = drawn.data[0].x
    assert set(levels) == {"8", "6", "4", "3", "2"}
    column = next(i for i, pair in enumerate(zip(places, levels, strict=True)) if pair == ("down", "2"))
    value = shown.result["table"]["damage"]["model.layers.5.mlp.down_proj:bits"]["2"]
    assert drawn.data[0].customdata[5][column] == f"model.layers.5.mlp.down_proj:bits = 2: {value:.3g}"
