"""Latency of a tiny model, really measured on this machine; nothing is asserted about how long anything takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from autoeff.errors import InputError
from autoeff.evaluators import latency_fit, loading
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.latency import Latency
from autoeff.evaluators.latency_table import LatencyTable
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import EvaluationSetup, LatencySpec
from autoeff.kernels import timing
from autoeff.spaces.costs import CostModel

KNOBS: dict[str, dict[str, object]] = {"bits": {"group_size": 32}, "skip": {}, "width": {"multiple": 1}, "heads": {}}


@pytest.fixture
def timed(setup_of: Callable[..., EvaluationSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvaluationSetup]:
    """A setup whose latency is asked for, measured in few rounds."""
    monkeypatch.setattr(timing, "AIMED_S", 1e-4)
    monkeypatch.setattr(latency_fit, "_ROUNDS", 5)
    monkeypatch.setattr(latency_fit, "_TURN_S", 0.0)
    monkeypatch.setattr(latency_fit, "_RANDOM_CONFIGURATIONS", 2)

    def make(family: str = "llama", knobs: dict[str, dict[str, object]] = KNOBS, **fields: object) -> EvaluationSetup:
        spec = {"phases": ("decode",), "batch": 2, "context": 24, "folder": str(tmp_path / "latency")} | fields
        return replace(setup_of(family, knobs), latency=LatencySpec(**spec))  # type: ignore[arg-type]

    return make


def latency_of(preparation: Preparation) -> Latency:
    assert preparation.latency is not None
    return preparation.latency


def table_of(preparation: Preparation) -> LatencyTable:
    path = latency_of(preparation).table
    assert path is not None
    return LatencyTable.read(path, torch.device("cpu"))


def test_times_are_measured_once_and_kept(timed: Callable[..., EvaluationSetup]) -> None:
    first = prepare(timed())
    table, latency = table_of(first), latency_of(first)
    assert latency.method == "predicted"
    assert all(entry.low_ns <= entry.median_ns <= entry.high_ns for entry in table.entries.values())
    assert {key.split()[0] for key in table.entries} == {"linear", "linear_wq", "attention_decode"}
    (fit,) = table.fits.values()
    assert (fit.whole, fit.unserved) == (("attention", "ffn"), ())
    assert "dense" in [row["label"] for row in fit.rows]
    again = prepare(timed())
    assert table_of(again) == table
    assert latency_of(again).digest == latency.digest
    assert again.space == first.space
    costs = CostModel(first.space, batch=2, context=24)
    assert costs.measures["decode_ms"].method == "predicted"
    assert costs.dense("decode_ms") == Fraction(first.space.dense["decode_ns"], 10**6) > 0
    assert prepare(replace(timed(), latency=None)).digest == first.digest  # quality does not depend on times


def test_interrupted_measurement_goes_on(timed: Callable[..., EvaluationSetup]) -> None:
    setup = timed(knobs={"bits": {"group_size": 32}})
    prepared = prepare(setup)
    whole, path = table_of(prepared), latency_of(prepared).table
    assert path is not None
    missing = sorted(whole.entries)[::3]
    replace(whole, entries={key: entry for key, entry in whole.entries.items() if key not in missing}).write(path)
    found = table_of(prepare(setup))
    assert found.entries.keys() == whole.entries.keys()
    assert all(found.entries[key] == whole.entries[key] for key in whole.entries.keys() - set(missing))
    assert found.fits == whole.fits


def test_other_shapes_share_the_file(timed: Callable[..., EvaluationSetup]) -> None:
    first = table_of(prepare(timed(knobs={"bits": {"group_size": 32}})))
    second = table_of(prepare(timed(knobs={"bits": {"group_size": 32}}, phases=("prefill",))))
    assert first.entries.items() < second.entries.items()
    assert first.fits.items() < second.fits.items()


def test_finalists_are_measured_end_to_end(timed: Callable[..., EvaluationSetup]) -> None:
    setup = timed("qwen2", KNOBS, phases=("decode", "prefill"))
    assert setup.latency is not None
    evaluator = Evaluator(replace(setup, latency=None))
    space = evaluator.space
    cut = dict(space.at([min(2, len(d.levels) - 1) if d.knob != "skip" else 0 for d in space.decisions]).levels)
    found = evaluator.latency({"dense": {}, "cut": cut}, setup.latency)
    for measurements in found.values():
        assert [m.name for m in measurements] == ["decode_ms", "prefill_ms"]
        assert all(m.method == "measured" and m.value > 0 and m.spread is not None and m.hardware for m in measurements)


def test_model_that_is_kept_in_16_bits_is_served_in_them(timed: Callable[..., EvaluationSetup], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_WIDE_BYTES", 0)
    setup = timed("mistral", {"bits": {"group_size": 32}})
    assert {key.split()[-1] for key in table_of(prepare(setup)).entries} == {"bfloat16"}
    evaluator = Evaluator(replace(setup, latency=None))
    levels = {"it": {d.key: 4 for d in evaluator.space.decisions}}
    model = evaluator.served(levels)["it"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert setup.latency is not None
    (found,) = evaluator.latency(levels, setup.latency)["it"]
    assert found.value > 0


def test_encoder_has_prefill_alone(timed: Callable[..., EvaluationSetup], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="encoder and decodes nothing"):
        prepare(replace(timed(), model=str(Path(timed().model).parent / "bert")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "H300"}, "no data sheet of target 'H300'; allowed: A100"),
        ({"phases": ("prefill",), "context": 64, "batch": 65}, "up to 4096 tokens: got 4160"),
    ],
)
def test_what_cannot_be_known_is_refused(timed: Callable[..., EvaluationSetup], fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(timed(**fields))


def test_times_of_an_absent_gpu_are_estimated_and_say_so(timed: Callable[..., EvaluationSetup], tmp_path: Path) -> None:
    found = prepare(timed(target="H200", phases=("decode", "prefill"), context=None))
    latency = latency_of(found)
    assert (latency.method, latency.device, latency.table) == ("estimated", "H200", None)
    assert not (tmp_path / "latency").exists()
    assert any("estimated" in notice and "nothing was measured" in notice for notice in found.notices)
    costs = CostModel(found.space, batch=2, context=64)
    assert {name: form.method for name, form in costs.measures.items() if form.method != "exact"} == {
        "decode_ms": "estimated", "prefill_ms": "estimated",
    }  # fmt: skip
    assert json.loads(json.dumps(found.report()))["latency"]["method"] == "estimated"
