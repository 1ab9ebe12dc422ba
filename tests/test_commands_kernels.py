"""The verbs of the kernels: what they print, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from autoeff.cli import main
from autoeff.roofline import draw_roofline


def test_compile_prints_a_row_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["kernels", "compile", "--target", "sm_90", "--kernels", "kv_evict gather"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows
    for row in rows:
        assert list(row) == ["kernel", "config", "registers", "spill", "shared_bytes", "wgmma"]
        assert row["kernel"].startswith("kv_evict")
        assert (row["spill"], row["registers"] > 0) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--target", "sm_80"], "cannot compile for 'sm_80'; allowed: sm_90"),
        (["compile", "--kernels", "nothing"], "no kernel starts with 'nothing'"),
        (["bench", "--ops", "nothing"], "no 'nothing'; allowed: attention_block_sparse"),
        (["bench", "--rounds", "1"], "--rounds must be at least 2: got 1"),
    ],
)
def test_bad_input_ends_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bench_times_what_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["kernels", "bench", "--ops", "kv_evict", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "| kv_evict | demo |" in capsys.readouterr().out
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["op"] for row in found["rows"]} == {"kv_evict"}
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = draw_roofline(found).axes
    points = sorted((float(x), float(y)) for drawn in axes.collections for x, y in np.asarray(drawn.get_offsets()))
    ours = [row for row in found["rows"] if row["kind"] == "autoeff"]
    expected = sorted((row["flops"] / row["moved_bytes"], row["flops"] / row["median_us"] / 1e3) for row in ours)
    np.testing.assert_allclose(points, expected)
