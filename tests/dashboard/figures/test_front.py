"""Quality over cost."""

from __future__ import annotations

from autoeff.dashboard.figures.front import Dot, Guest, draw_front
from autoeff.dashboard.theme import DARK, LIGHT

DOTS = [Dot(1, "searched", 3.0, 0.5), Dot(2, "searched", 2.0, 0.9), Dot(3, "random", 3.0, 0.8), Dot(4, "searched", 1.0, 0.0)]
GUESTS = [Guest("dense", "dense", 0, 16.0, 0.0), Guest("found", "<b>best</b>", 1, 3.0, 0.5)]


def test_points_front_and_guests_are_drawn() -> None:
    drawn = draw_front(DOTS, [DOTS[0], DOTS[1]], GUESTS, LIGHT, quality="kl", cost="avg_bits", limit=3.5, revision="job")
    traces = {trace.name: trace for trace in drawn.data}
    assert list(traces) == ["other trials", "searched trials", "Pareto front", "dense", "found"]
    assert [row[0] for row in traces["searched trials"].customdata] == [1, 2]  # a logarithm has no zero
    assert (list(traces["Pareto front"].x), list(traces["Pareto front"].y)) == ([2.0, 3.0], [0.9, 0.5])
    assert traces["found"].text == ("&lt;b&gt;best&lt;/b&gt;",)
    assert drawn.layout.shapes[0].x0 == 3.5
    assert (drawn.layout.xaxis.title.text, drawn.layout.yaxis.title.text) == ("avg_bits, bits/weight", "kl, nats/token")
    assert drawn.layout.yaxis.type == "log"


def test_the_dense_model_stands_below_everything() -> None:
    drawn = draw_front(DOTS, [], GUESTS, LIGHT, quality="kl", cost="avg_bits")
    (dense,) = next(trace.y for trace in drawn.data if trace.name == "dense")
    assert 0 < dense < 0.5


def test_values_of_own_code_may_be_negative() -> None:
    drawn = draw_front([Dot(1, "searched", 1.0, -2.0)], [], [], DARK, quality="score", cost="trial", linear=True)
    assert list(drawn.data[0].y) == [-2.0]
    assert drawn.layout.yaxis.type is None


def test_zoom_stays_while_the_job_is_the_same() -> None:
    one, two = (draw_front(dots, [], [], LIGHT, quality="kl", cost="avg_bits", revision="job") for dots in (DOTS[:1], DOTS))
    assert one.layout.uirevision == two.layout.uirevision == "job"
