"""The file of measured times: read back as it was, and refused where it was measured elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoeff.errors import InputError
from autoeff.evaluators.latency_table import Entry, Fit, LatencyTable, Operation
from autoeff.evaluators.setup import LatencySpec
from autoeff.kernels import tuned

CPU = torch.device("cpu")
FIT = Fit({"model": 12.5, "linear": 1.0}, ("attention",), ("heads",), ({"label": "dense", "measured_ns": 7, "fitted_ns": 8},))


@pytest.fixture
def table() -> LatencyTable:
    return replace(LatencyTable.empty(CPU), entries={"linear k=2 m=1 n=3 float32": Entry(10, 9, 12, 15)}, fits={"key": FIT})


def test_file_holds_the_table(table: LatencyTable, tmp_path: Path) -> None:
    path = table.path(tmp_path / "new")
    table.write(path)
    assert LatencyTable.read(path, CPU) == table
    assert json.loads(path.read_text())["format"] == 1


def test_no_file_is_an_empty_table_of_this_device(tmp_path: Path) -> None:
    found = LatencyTable.read(tmp_path / "none.json", CPU)
    assert (found.entries, found.fits, found.threads) == ({}, {}, torch.get_num_threads())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"device": "CPU of another kind"}, "device CPU of another kind"),
        ({"threads": 77}, "threads 77"),
        ({"versions": {"torch": "1.0"}}, "versions {'torch': '1.0'}"),
    ],
)
def test_table_of_another_machine_is_refused(table: LatencyTable, tmp_path: Path, change: dict[str, object], word: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_json() | change))
    with pytest.raises(InputError, match="remove it to measure again") as caught:
        LatencyTable.read(path, CPU)
    assert word in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "entries": {"a": {}}, "fits": {}}'])
def test_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(InputError):
        LatencyTable.read(path, CPU)


def test_machines_and_versions_have_files_of_their_own(table: LatencyTable, tmp_path: Path) -> None:
    others = (replace(table, threads=77), replace(table, device="GPU", threads=0), replace(table, versions={"torch": "1.0"}))
    assert len({other.path(tmp_path) for other in (table, *others)}) == 4


def test_tuning_a_gpu_begins_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tuned, "_FOLDER", tmp_path)
    before, cpu = LatencyTable.empty(torch.device("cuda")), LatencyTable.empty(CPU)
    tuned.path_of("NVIDIA H200").write_text('{"moe": []}')
    after = LatencyTable.empty(torch.device("cuda"))
    tuned.path_of("NVIDIA H100").write_text("{}")
    assert LatencyTable.empty(torch.device("cuda")) == after
    assert before.path(tmp_path) != after.path(tmp_path)
    assert LatencyTable.empty(CPU) == cpu


def test_operation_is_known_by_name_sizes_and_dtype() -> None:
    operation = Operation("linear_wq", (("bits", 4), ("m", 1)), "float32")
    assert operation.key == "linear_wq bits=4 m=1 float32"
    assert operation["bits"] == 4


def test_spec_travels_as_json() -> None:
    spec = LatencySpec(("decode",), 2, None, "folder", "H200")
    assert LatencySpec.from_json(json.loads(json.dumps(spec.__dict__))) == spec
