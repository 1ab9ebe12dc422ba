"""Where the names of marks stand, so that they cover neither each other nor the marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

__all__ = ["Mark", "placed"]

_WIDE, _HIGH = 6.2, 14.0
"""Pixels of a character, and of a line."""
_APART = 9.0
"""From a mark to its name."""
_MARGIN = 12.0
"""Beyond the plot, where names may still stand."""
_SIDES = {"middle right": (1, 0), "middle left": (-1, 0), "top center": (0, 1), "bottom center": (0, -1), "top right": (1, 1),
          "top left": (-1, 1), "bottom right": (1, -1), "bottom left": (-1, -1)}  # fmt: skip

Box = tuple[float, float, float, float]
"""Left, right, bottom, top."""


@dataclass(frozen=True)
class Mark:
    """A named mark at data coordinates; `text` is empty where the mark has no name but is not to be covered."""

    x: float
    y: float
    text: str


def placed(marks: Sequence[Mark], *, frame: Box, size: tuple[float, float], linear: bool, upright: float | None = None) -> list[str | None]:
    """Plotly's `textposition` for the name of each mark; None where it has no name, or there is no room: a pointer is told it.

    The first marks choose first.

    Args:
        marks: With their places.
        frame: The least and the largest x, and the least and the largest y, that are drawn.
        size: Width and height of the plot in pixels, about.
        linear: Whether `y` is drawn as it is, not by its logarithm.
        upright: Of a vertical line that names do not cross.
    """
    bent = (lambda y: y) if linear else log10
    left, right, low, high = frame[0], frame[1], bent(frame[2]), bent(frame[3])

    def across(x: float) -> float:
        return (x - left) / (right - left or 1.0) * size[0]

    at = [(across(mark.x), (bent(mark.y) - low) / (high - low or 1.0) * size[1]) for mark in marks]
    taken: list[Box] = [(x - 5, x + 5, y - 5, y + 5) for x, y in at]
    if upright is not None:
        taken.append((across(upright) - 1, across(upright) + 1, -size[1], 2 * size[1]))
    found: list[str | None] = []
    for mark, (x, y) in zip(marks, at, strict=True):
        boxes = {name: _box(x, y, *side, len(mark.text) * _WIDE) for name, side in _SIDES.items() if mark.text}
        side = next((name for name, box in boxes.items() if _inside(box, size) and not any(_meet(box, other) for other in taken)), None)
        found.append(side)
        if side is not None:
            taken.append(boxes[side])
    return found


def _inside(box: Box, size: tuple[float, float]) -> bool:
    return box[0] >= -_MARGIN and box[1] <= size[0] + _MARGIN and box[2] >= -_MARGIN and box[3] <= size[1] + _MARGIN


def _box(x: float, y: float, right: int, up: int, wide: float) -> Box:
    left = x + (_APART if right > 0 else -_APART - wide if right < 0 else -wide / 2)
    bottom = y + (_APART if up > 0 else -_APART - _HIGH if up < 0 else -_HIGH / 2)
    return left, left + wide, bottom, bottom + _HIGH


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
