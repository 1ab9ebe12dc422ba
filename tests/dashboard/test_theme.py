"""Colours."""

from __future__ import annotations

import pytest

from autoeff.dashboard.figures.maps import draw_levels
from autoeff.dashboard.layers import Grid
from autoeff.dashboard.theme import DARK, LIGHT, Palette, mixed, palette
from autoeff.spaces.knob import known_knobs


def luminance(colour: str) -> float:
    """Relative, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=lambda colours: str(colours.name))
def test_text_and_marks_can_be_read(colours: Palette) -> None:
    for name in ("ink", "muted", "found", "guest"):
        assert contrast(getattr(colours, name), colours.page) >= 4.5, name
    for knob in known_knobs():
        assert contrast(colours.knob(knob), colours.page) >= 2.6, knob
        drawn = draw_levels([Grid(knob, (("q",),), {"q": "q"}, (0,), {})], colours).data[0]
        assert all(contrast(drawn.textfont.color, cell) >= 4.5 for _, cell in drawn.colorscale), knob


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=lambda colours: str(colours.name))
def test_a_knob_has_one_colour_and_no_other_has_it(colours: Palette) -> None:
    own = [colours.knob(name) for name in known_knobs() if name not in ("noise", "faulty")]
    assert len(set(own)) == len(own)
    assert colours.knob("of_a_third_party") == colours.knob("of_a_third_party")


def test_a_page_of_unknown_kind_is_light() -> None:
    assert (palette(None), palette("dark")) == (LIGHT, DARK)


def test_colours_mix() -> None:
    assert (mixed("#000000", "#ffffff", 0.0), mixed("#000000", "#ff0000", 1.0), mixed("#000000", "#ffffff", 0.5)) == (
        "#000000",
        "#ff0000",
        "#808080",
    )
