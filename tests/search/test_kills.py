"""SIGKILL at random moments: the short form of `benchmarks/kill_moments.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

LOOSE = "linear_bytes<=0.35x"


@pytest.mark.timeout(900)  # each moment is a search of its own, and a resumed one
@pytest.mark.parametrize("moments", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_search_of_which_a_process_is_killed_leaves_the_sequence_of_an_undisturbed_run(
    root: Path,
    tiny_models: dict[str, Path],
    tiny_text: Path,
    searched_once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moments: int,
) -> None:
    spec = importlib.util.spec_from_file_location("kill_moments", root / "benchmarks" / "kill_moments.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill_moments", script)  # where dataclasses look their module up
    spec.loader.exec_module(script)
    search = [str(tiny_models["llama"]), "--knobs=bits,skip", "--set=bits.group_size=16", f"--limit={LOOSE}", "--trials=60"]
    text = [f"--data={tiny_text}", "--windows=8", "--length=16"]
    held_out = [f"--eval-data={tiny_text}", "--eval-windows=8", "--eval-length=16", "--eval-draw=first"]
    kills = script.check(moments, 1, tmp_path, [*search, *text, *held_out], script.trials(searched_once / "loose"))
    assert len({kill.what for kill in kills}) == moments
