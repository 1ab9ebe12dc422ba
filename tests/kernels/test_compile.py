from __future__ import annotations

import pytest
import torch

from autoeff.kernels import dequantize_wq

module = pytest.importorskip("autoeff.kernels.compile", reason="Triton is not installed")


def test_every_kernel_compiles_for_hopper_and_fits() -> None:
    found = dict(module.compile_all())
    assert len(found) == 5 * 5  # widths; dtypes x symmetry, and a ragged one
    assert {label: used for label, used in found.items() if not used.fits} == {}
    # half of the register file stays free for a second and third program on the processor
    assert max(used.registers for used in found.values()) <= 64


def test_spills_and_too_much_shared_memory_do_not_fit() -> None:
    fits = module.Resources(registers=32, spill_bytes=0, shared_bytes=module.SHARED_BYTES, wgmma=False)
    assert fits.fits
    assert not module.Resources(255, 8, 0, False).fits
    assert not module.Resources(32, 0, module.SHARED_BYTES + 1, False).fits


def test_a_single_row_and_value_compile_too() -> None:
    """Sizes of 1 are compiled in as constants."""
    planes = {"plane4": torch.empty(1, 1, dtype=torch.uint8, device="meta")}
    scale = torch.empty(1, 1, dtype=torch.float16, device="meta")
    out = torch.empty(1, 1, dtype=torch.float16, device="meta")
    grid, arguments, options = dequantize_wq._arguments(planes, scale, scale, 4, 1, 8, out)
    assert module.resources(dequantize_wq._dequantize_kernel, grid, arguments, options).fits


def test_the_real_driver_is_put_back() -> None:
    config = module.triton.runtime.driver
    before = config._active
    with module.hopper():
        assert config.active.get_current_target().arch == 90
    assert config._active is before


def test_command_prints_a_line_for_each_case(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = module.Resources(32, 0, 1024, False), module.Resources(255, 16, 0, True)
    monkeypatch.setattr(module, "compile_all", lambda: iter([("one", good), ("two", bad)]))
    assert module._main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok   one: 32 registers, 0 B spilled, 1024 B shared",
        "FAIL two: 255 registers, 16 B spilled, 0 B shared",
    ]
