"""Charts with little to decide: what stands in them is what was given."""

from __future__ import annotations

from typing import Any

import pytest

from autoeff.dashboard.figures.blocks import draw_blocks
from autoeff.dashboard.figures.fronts import draw_fronts
from autoeff.dashboard.figures.latency import Timed, draw_latency
from autoeff.dashboard.figures.roofline import draw_roofline
from autoeff.dashboard.plant import Operation
from autoeff.dashboard.theme import LIGHT


def test_blocks_are_bars_in_the_colour_of_their_knob() -> None:
    drawn = draw_blocks({"bits": {1: 10.0, 0: 30.0}, "skip": {0: 5.0}}, [0, 1, 2], LIGHT, cost="weight_bytes")
    assert [(bar.name, list(bar.x), list(bar.y)) for bar in drawn.data] == [("bits", [0, 1], [30.0, 10.0]), ("skip", [0], [5.0])]
    assert drawn.data[0].marker.color == LIGHT.knob("bits")
    assert drawn.layout.yaxis.ticksuffix == "B"
    assert drawn.layout.xaxis.range[1] > 2  # a block that saves nothing has its place


def test_fronts_have_a_line_each() -> None:
    drawn = draw_fronts({"a <i>": [(1.0, 0.5, 3)], "b": [(1.0, 0.0, 4), (2.0, 0.1, 5)]}, LIGHT, quality="kl", cost="weight_bytes")
    assert [trace.name for trace in drawn.data] == ["a &lt;i&gt;", "b"]
    assert list(drawn.data[1].x) == [2.0]
    many = draw_fronts({str(i): [(1.0, 0.5, i)] for i in range(8)}, LIGHT, quality="kl", cost="weight_bytes")
    assert len({(trace.line.color, trace.line.dash) for trace in many.data}) == 8
    assert drawn.data[0].line.dash != drawn.data[1].line.dash  # where both are the same, both are seen


def test_predictions_stand_over_measurements() -> None:
    drawn = draw_latency([Timed("dense", "dense", "decode_ms", 2.0, 2.5, 0.1), Timed("found", "x", "decode_ms", 1.0, 1.0, 0.1)], LIGHT)
    line, dense, found = drawn.data
    assert list(line.x) == list(line.y)
    assert (list(dense.x), list(dense.y), list(dense.error_x.array)) == ([2.5], [2.0], [0.1])
    assert found.customdata[0][2] == pytest.approx(0.0)


def test_no_operation_is_above_the_roof() -> None:
    operations = [Operation("a", "dense", 100, 400, 1e-6), Operation("b", "4 bit", 1000, 100, 1e-6), Operation("c", "4 bit", 10, 100, 1e-6)]
    drawn = draw_roofline(operations, LIGHT)
    (low, ridge, high), (at_low, at_ridge, at_high) = drawn.data[0].x, drawn.data[0].y
    assert ridge == pytest.approx(1000 / 400)  # the highest speed over the highest bandwidth
    assert at_ridge == at_high == pytest.approx(1e9)
    for trace in drawn.data[1:]:
        for x, y in zip(trace.x, trace.y, strict=True):
            assert y <= min(x * at_low / low, at_high) * (1 + 1e-9)
    assert high > 10


def test_importance_and_paths_come_from_the_trials(client: Any, shown: Any, ground: Any) -> None:
    from autoeff.dashboard.fetch import trial_rows
    from autoeff.dashboard.figures.importance import draw_importance, draw_parallel, study_of

    rows = trial_rows(client, shown.job.job, 1000)
    tokens = max(row.measurements["kl"].tokens or 0 for row in rows if "kl" in row.measurements)
    study = study_of(rows, "kl", tokens, ground.space)
    assert study is not None
    ranked, bars = draw_importance(study, LIGHT, shown=5)
    assert len(ranked) == len(bars.data[0].y) == 5
    assert set(bars.data[0].marker.color) <= {LIGHT.knob(knob) for knob in ("bits", "skip", "kv_bits")}
    paths = draw_parallel(study, ranked, LIGHT, quality="kl", logarithm=True)
    assert len([trace for trace in paths.data if trace.mode == "lines"]) == min(150, len(study.trials))
    assert len(paths.layout.xaxis.ticktext) == 6
    assert all(" " in name and "." not in name for name in bars.layout.yaxis.ticktext)  # block, place, knob
    assert study_of([], "kl", tokens, ground.space) is None
