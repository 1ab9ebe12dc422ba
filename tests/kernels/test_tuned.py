from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoeff.kernels import tuned

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuned, "_FOLDER", tmp_path)
    tuned.configurations.cache_clear()
    tuned._nearest.cache_clear()
    yield tmp_path
    tuned.configurations.cache_clear()
    tuned._nearest.cache_clear()


def _write(path: Path, **sizes: tuple[int, int, int]) -> None:
    path.write_text(json.dumps({"op": [{"m": m, "n": n, "k": k, "kernel": name} for name, (m, n, k) in sizes.items()]}), encoding="utf-8")


def test_rows_are_rounded_up_and_the_other_sizes_to_the_nearest(folder: Path) -> None:
    _write(folder / "default.json", few=(4, 4096, 4096), many=(64, 128, 128), wide=(64, 4096, 128))
    assert tuned.nearest("op", 4, 128, 128, CPU) == {"kernel": "few"}
    assert tuned.nearest("op", 5, 128, 128, CPU) == {"kernel": "many"}
    assert tuned.nearest("op", 64, 2048, 512, CPU) == {"kernel": "wide"}
    assert tuned.nearest("op", 999, 724, 512, CPU) == {"kernel": "many"}  # below 724.1 = sqrt(128 x 4096)


def test_a_device_overrides_the_default(folder: Path) -> None:
    _write(folder / "default.json", plain=(1, 1, 1))
    _write(folder / "nvidia_h200.json", tuned=(1, 1, 1))
    assert tuned.configurations("op", "NVIDIA H200")[0]["kernel"] == "tuned"
    assert tuned.configurations("op", "another")[0]["kernel"] == "plain"


def test_an_op_without_configuration_is_named() -> None:
    with pytest.raises(KeyError, match="no configuration of nothing"):
        tuned.configurations("nothing")
