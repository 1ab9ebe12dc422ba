"""Workers and measured operations."""

from __future__ import annotations

from typing import Any

from autoeff.evaluators.latency_table import Entry, LatencyTable


def test_a_plant_without_workers_says_what_starts_one(view: Any, words: Any) -> None:
    page = view("hardware")
    assert not page.exception
    assert "autoeff worker" in words(page)


def test_measured_operations_are_listed_and_filtered(view: Any, plant: Any) -> None:
    folder = plant.home / "latency"
    folder.mkdir(exist_ok=True)
    entry = Entry(1200, 1100, 1300, 30)
    table = LatencyTable(
        "CPU <b>x</b>", {"torch": "2"}, 1, "2026-11-01", {"linear k=8 m=1 n=4 float32": entry, "softmax n=4 float32": entry}
    )
    table.write(folder / "cpu.json")
    page = view("hardware")
    assert not page.exception
    assert page.selectbox(key="latency_table").options == ["CPU <b>x</b> · torch 2 · 2026-11-01"]
    assert len(page.get("plotly_chart")) == 1
    page.text_input(key="latency_filter").set_value("linear k=8").run()
    assert list(page.dataframe[-1].value["operation"]) == ["linear k=8 m=1 n=4 float32"]
