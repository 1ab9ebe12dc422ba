"""Where names of marks stand."""

from __future__ import annotations

from typing import Any

from autoeff.dashboard.figures.labels import Mark, placed

FRAME: Any = {"frame": (0.0, 10.0, 0.0, 10.0), "size": (400.0, 300.0), "linear": True}


def test_a_name_avoids_other_names_marks_and_the_limit() -> None:
    alone, last = [Mark(5, 5, "alone")], [Mark(10, 5, "at the right edge")]
    assert placed(alone, **FRAME) == ["middle right"]
    assert placed(last, **FRAME) == ["middle left"]
    assert placed(alone, upright=5.5, **FRAME) == ["middle left"]
    assert placed([*alone, Mark(5.5, 5, "")], **FRAME) == ["middle left", None]
    two = placed([Mark(5, 5, "one"), Mark(5.1, 5.1, "other")], **FRAME)
    assert len(set(two)) == 2
    assert None not in two


def test_a_name_without_room_is_left_out() -> None:
    crowd = [Mark(5 + 0.3 * (i % 5), 5 + 0.3 * (i // 5), "a long name") for i in range(25)]
    assert None in placed(crowd, **FRAME)
    assert placed([], **FRAME) == []


def test_heights_are_by_the_logarithm_where_the_axis_is() -> None:
    marks = [Mark(5, 1e-4, "low"), Mark(5, 1e-3, "high")]
    near, apart = (placed(marks, frame=(0, 10, 1e-5, 1e0), size=(400, 300), linear=linear) for linear in (True, False))
    assert apart == ["middle right", "middle right"]
    assert near != apart
