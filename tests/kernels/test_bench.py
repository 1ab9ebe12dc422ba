from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autoeff.kernels import bench, tuned
from autoeff.kernels.problems import OPS, problems

CPU = torch.device("cpu")
SMALL = {
    "attention_block_sparse": (40, 16, 16),
    "attention_decode": (2, 70, 32),
    "ffn_sparse": (1, 64, 32),
    "kv_evict": (2, 48, 16),
    "moe": (1, 64, 32),
    "moe_wq": (1, 128, 64),
}


@pytest.mark.parametrize("op", OPS)
def test_every_path_of_a_problem_runs_and_agrees_where_it_should(op: str) -> None:
    for problem in problems(op, *SMALL.get(op, (3, 64, 64)), CPU, torch.bfloat16, heads=2):
        found = problem.ours()
        assert found.isfinite().all()
        assert problem.moved_bytes > 0
        assert problem.flops > 0
        for name, call in problem.dense.items():
            assert call().shape == found.shape, name
        if op in ("linear_24", "linear_lora", "moe", "kv_evict", "linear_w8a8_int8") or problem.variant == "16 bit":
            exact = next(iter(problem.dense.values()))().float()
            if op != "linear_lora":  # it adds something
                assert float((found.float() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.interpreted
@pytest.mark.parametrize("op", OPS)
def test_interpreted_default_configuration_gives_what_the_operation_gives(op: str) -> None:
    sizes = SMALL.get(op, (3, 64, 64))
    for problem in problems(op, *sizes, CPU, torch.float16, heads=2)[:2]:
        found, exact = problem.tuned(tuned.nearest(op, *sizes, CPU)).float(), problem.ours().float()
        assert float((found - exact).norm() / exact.norm()) < 5e-3


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="no operation 'linear'; allowed: attention_block_sparse, "):
        problems("linear", 1, 1, 1, CPU, torch.bfloat16)


def test_every_committed_operation_is_benched() -> None:
    assert set(OPS) == set(json.loads(tuned.path_of("default").read_text(encoding="utf-8")))
    for op in OPS:
        for model in bench.MODELS.values():
            assert [*bench.shapes(op, model, "decode"), *bench.shapes(op, model, "prefill")]


def test_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ops", "kv_evict,linear_w8a8_fp8", "--models", "demo", "--phases", "prefill", "--rounds", "2", "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "kernels.md").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    if not torch.cuda.is_available():
        assert "CPU paths, not those of a GPU" in result["paths"]
    rows = result["rows"]
    assert {row["op"] for row in rows} == {"kv_evict", "linear_w8a8_fp8"}
    assert {row["kind"] for row in rows} == {"autoeff", "dense", "other"}
    for row in rows:
        if row["median_us"] is not None:
            assert row["low_us"] <= row["median_us"] <= row["high_us"]
        if row["share"] is not None:
            assert row["share"] == pytest.approx(row["floor_us"] / row["median_us"])


def test_a_path_that_fails_is_a_row_with_the_reason() -> None:
    def missing() -> None:
        raise ImportError("no such library")

    problem = problems("linear_24", 2, 16, 16, CPU, torch.bfloat16)[0]
    broken = type(problem)(**{**vars(problem), "others": {"another": missing}})
    rows = list(bench._rows([broken], ("demo", "decode", 2, 16, 16), CPU, 2, bench.Limits(1e9, 1e12, 0)))
    failed = [row for row in rows if row.path == "another"]
    assert [(row.median_us, row.note) for row in failed] == [(None, "ImportError: no such library")]
    assert "did not run: ImportError: no such library" in bench.markdown(rows, {"device": "this"})
    ours = next(row for row in rows if row.kind == "autoeff")
    assert ours.floor_us == pytest.approx(problem.moved_bytes / 1e9 * 1e6)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--ops", "linear"])
    assert stopped.value.code == 2
    assert "no 'linear'; allowed: attention_block_sparse" in capsys.readouterr().err
