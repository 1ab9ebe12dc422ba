from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

module = pytest.importorskip("autoeff.kernels.compile", reason="Triton is not installed")


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    """One configuration of every kernel x variant, without those that differ little; the command compiles all."""
    first = {(case.name, case.config.split(";")[0]): case for case in reversed(list(module.cases()))}
    dtypes = ("torch.bfloat16", "torch.float16")
    for name, variants in {
        "moe down": ("2 bit", "4 bit", "6 bit", "3 bit, torch.bfloat16", "8 bit, torch.float16"),
        "moe gate_up": ("2 bit", "4 bit", "6 bit", "3 bit, torch.bfloat16", "8 bit, torch.float16"),
        "linear_lora expand": tuple(f"{dtype}, rank 128" for dtype in dtypes),
        "linear_lora shrink": tuple(f"{dtype}, rank 128" for dtype in dtypes),
        "ffn_sparse join gated": dtypes[:1],
        "ffn_sparse join plain": dtypes[:1],
        "ffn_sparse list": dtypes[:1],
        "kv_evict gather": dtypes[:1],
    }.items():
        first = {key: case for key, case in first.items() if key[0] != name or not key[1].startswith(variants)}
    return [module.compile_case(case) for case in first.values()]


def test_every_kernel_compiles_for_hopper_and_fits(rows: list[Any]) -> None:
    assert {row.as_json() for row in rows if not row.passes} == set()
    variants = Counter(row.case.name for row in rows)
    assert variants == {
        "attention_block_sparse": 2 * 2,  # dtypes x blocks
        "attention_decode join": 2,  # dtypes
        "attention_decode part": 4 * 2,  # widths x dtypes
        "dequantize_wq": 5 * 5,  # widths; dtypes x symmetry, and a ragged one
        "ffn_sparse join gated": 1,
        "ffn_sparse join plain": 1,
        "ffn_sparse list": 1,
        "ffn_sparse product": 2,
        "kv_evict gather": 1,
        "kv_evict mass": 2,
        "kv_evict score": 2,
        "linear_24 left": 2,  # dtypes
        "linear_block_sparse left": 2 * 2,  # dtypes x blocks
        "linear_lora expand": 2,
        "linear_lora shrink": 2,
        "linear_lowrank expand": 2,
        "linear_lowrank fused": 2 * 2,  # dtypes x ranks
        "linear_lowrank shrink": 2,
        "linear_w8a8 left": 2,  # forms
        "linear_w8a8 quantize": 2 * 2,  # forms x dtypes
        "linear_wq gemv": 5 * 2,  # widths x dtypes
        "linear_wq left": 5 * 2,
        "moe down": 2 + 2,  # dtypes in 16 bits; 3 and 8 bits
        "moe gate_up": 2 + 2,
    }
    # half of the register file stays free for a second and third program on the processor
    assert max(row.used.registers for row in rows if row.case.name == "dequantize_wq") <= 64


def test_weight_reaches_the_tensor_core_without_a_detour_through_shared_memory(rows: list[Any]) -> None:
    """Staged there, the same kernel takes 158 registers at a tile of 64 x 16."""
    small = [row.used.registers for row in rows if row.case.name == "linear_wq left" and "block_n 64, block_m 16" in row.case.config]
    assert len(small) == 10
    assert max(small) <= 128


def test_every_committed_configuration_was_compiled_and_passed() -> None:
    """After a change of a kernel or a configuration: `python -m autoeff.kernels.compile --write`."""
    results = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    written = {(row["kernel"], row["config"]): row for row in results["rows"]}
    cases = {(case.name, case.config): case for case in module.cases()}
    assert written.keys() == cases.keys()
    for key, row in written.items():
        used = module.Resources(row["registers"], row["spill"], row["shared_bytes"], row["wgmma"])
        assert module.Row(cases[key], used).passes, key
    assert results["sources"] == {case.name: module.source(case.kernel) for case in cases.values()}


def test_spills_and_too_much_shared_memory_do_not_fit() -> None:
    fits = module.Resources(registers=32, spill_bytes=0, shared_bytes=module.SHARED_BYTES, wgmma=False)
    assert fits.fits
    assert not module.Resources(255, 8, 0, False).fits
    assert not module.Resources(32, 0, module.SHARED_BYTES + 1, False).fits


def test_every_kernel_compiles_where_all_sizes_are_1() -> None:
    """They are compiled in as constants, which lack what numbers have."""
    for case in {case.name: case for case in module.cases()}.values():
        ones = [1 if isinstance(argument, int) else argument for argument in case.arguments]
        assert module.resources(case.kernel, case.grid, ones, case.options).fits, case.name


def test_the_real_driver_is_put_back() -> None:
    config = module.triton.runtime.driver
    before = config._active
    with module.hopper():
        assert config.active.get_current_target().arch == 90
    assert config._active is before


@pytest.mark.parametrize("as_json", [False, True])
def test_command_prints_a_line_for_each_case(as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    used = {
        "one": module.Resources(32, 0, 1024, True),
        "two": module.Resources(255, 16, 0, True),
        "three": module.Resources(9, 0, 0, False),
    }
    cases = [module.Case(name, "x", None, (1,), (), {}, name == "three") for name in used]
    monkeypatch.setattr(module, "cases", lambda: iter(cases))
    monkeypatch.setattr(module, "compile_case", lambda case: module.Row(case, used[case.name]))
    assert module.main(["--json"] if as_json else []) == 1
    lines = capsys.readouterr().out.splitlines()
    if as_json:
        expected = {"kernel": "two", "config": "x", "registers": 255, "spill": 16, "shared_bytes": 0, "wgmma": True}
        assert json.loads(lines[1]) == expected
    else:
        assert lines == [
            "ok   one, x: 32 registers, 0 B spilled, 1024 B shared, wgmma",
            "FAIL two, x: 255 registers, 16 B spilled, 0 B shared, wgmma",
            "FAIL three, x: 9 registers, 0 B spilled, 0 B shared",
        ]


def test_command_refuses_other_arguments() -> None:
    assert module.main(["--all"]) == 2
