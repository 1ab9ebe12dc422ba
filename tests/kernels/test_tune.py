from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoeff.kernels import tune, tuned
from autoeff.kernels.problems import OPS

START: dict[str, Any] = {"kernel": "left", "block_n": 64, "splits": 4, "warps": 4}


def _cost(config: dict[str, Any]) -> float | None:
    """Least at 128, 1, 8; 16 splits do not run."""
    if config["splits"] == 16:
        return None
    return 100.0 + abs(config["block_n"] - 128) + 10 * config["splits"] + abs(config["warps"] - 8)


def test_neighbours_change_one_number_and_stay_inside_the_bounds() -> None:
    found = tune.neighbours({"kernel": "left", "block_m": 16, "warps": 8})
    assert found == [{"kernel": "left", "block_m": 32, "warps": 8}, {"kernel": "left", "block_m": 16, "warps": 4}]


def test_every_number_of_a_default_configuration_has_bounds() -> None:
    for op in OPS:
        for entry in tuned.configurations(op):
            for name, value in entry.items():
                if name not in (*tuned.SIZES, "kernel"):
                    low, high = tune.BOUNDS[name]
                    assert low <= value <= high, (op, name, value)


def test_climbing_ends_where_no_neighbour_is_faster() -> None:
    assert tune.climb(START, _cost) == {"kernel": "left", "block_n": 128, "splits": 1, "warps": 8}
    with pytest.raises(ValueError, match="the default configuration does not run"):
        tune.climb({**START, "splits": 16}, _cost)


def test_an_interrupted_climb_goes_on_where_it_was(tmp_path: Path) -> None:
    sizes, asked = {"m": 1, "n": 2, "k": 3}, []

    def run(config: dict[str, Any]) -> float | None:
        asked.append(config)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return _cost(config)

    log = tune.Log(tmp_path / "log", "here")
    with pytest.raises(KeyboardInterrupt):
        tune.climb(START, lambda config: log.time("op", sizes, config, run))
    with (tmp_path / "log").open("a") as file:
        file.write('{"about": "he')  # torn by the kill
    again = tune.Log(tmp_path / "log", "here")
    best = tune.climb(START, lambda config: again.time("op", sizes, config, run))
    assert best == {"kernel": "left", "block_n": 128, "splits": 1, "warps": 8}
    finished = asked[:6] + asked[7:]
    assert len({json.dumps(config) for config in finished}) == len(finished)
    other = tune.Log(tmp_path / "log", "elsewhere")
    assert other.time("op", sizes, START, lambda config: 1.0) == 1.0


def test_entries_of_other_operations_stay(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tune.write(path, "one", [{"m": 1, "warps": 4}])
    tune.write(path, "two", [{"m": 2, "warps": 8}, {"m": 3, "warps": 8}])
    tune.write(path, "one", [{"m": 1, "warps": 2}])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == {"one": [{"m": 1, "warps": 2}], "two": [{"m": 2, "warps": 8}, {"m": 3, "warps": 8}]}


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with tune.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), tune.locked(tmp_path / "lock"):
        pass
    with tune.locked(tmp_path / "lock"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA device: there is nothing to tune here\n")


def test_unknown_operations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--ops", "linear"])
    assert stopped.value.code == 2
    assert "no 'linear'; allowed: attention_block_sparse" in capsys.readouterr().err
