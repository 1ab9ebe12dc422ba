"""The verbs that weigh runs: what they print, and the one line of a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeff.cli import main
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def machine(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search `first`, one of another text `other`, and their database under `home`."""
    root = tmp_path_factory.mktemp("machine")
    (root / "text.txt").write_text("the dog sat on the mat and the cat ate the hat while all the others went there again\n" * 60)
    settings = Settings(home=root / "home", memory_cap_bytes=3 << 30)
    for name, windows in (("first", 8), ("other", 4)):
        text = {"source": str(root / "text.txt"), "windows": windows, "length": 16}
        job = {"model": str(tiny_models["llama"]), "data": text, "limits": ["linear_bytes<=0.35x"], "budget": {"trials": 40}}
        start(JobSpec.parse(job), root / name, settings)
    return root


@pytest.fixture
def command(machine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("AUTOEFF_HOME", str(machine / "home"))
    monkeypatch.chdir(machine)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_resolve_prints_predicted_beside_measured(command: Command) -> None:
    code, out, err = command("resolve", "first", "--limit", "linear_bytes<=0.30x")
    assert (code, err) == (0, "")
    assert re.search(r"expected to be best +predicted .*\nbest measured +measured +\d+ ", out)
    assert re.search(r"\nanswer +(predicted|measured): ", out)
    assert "mlp.down_proj:bits" in out
    found = json.loads(command("resolve", "first", "--limit", "linear_bytes<=0.30x", "--format", "json")[1])
    assert found["predicted"]["measurements"]["kl"]["method"] == "predicted"
    assert found["measured"]["measurements"]["kl"]["method"] == "measured"


def test_sensitivity_prints_the_worst_first(command: Command, tmp_path: Path) -> None:
    code, out, err = command("sensitivity", "first", "--out", tmp_path / "map")
    assert (code, err) == (0, "")
    assert (tmp_path / "map" / "damage.png").exists()
    found: dict[str, Any] = json.loads(command("sensitivity", "first", "--format", "json")[1])
    worst = found["rows"][0]
    assert re.search(rf"method +trial *\n{re.escape(worst['decision'])} +{worst['level']} ", out)
    assert "in all blocks together" in out
    assert found["picture"] is None


def test_compare_prints_the_best_at_common_budgets(command: Command, tmp_path: Path) -> None:
    code, out, err = command("compare", "first", "first", "--out", tmp_path / "fronts")
    assert (code, err) == (0, "")
    assert re.search(r"\nlinear_bytes<=0\.35x +[\d.e-]+ +[\d.e-]+ +equal *\n", out)
    assert "no setting differs" in out
    assert (tmp_path / "fronts" / "fronts.png").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["resolve", "absent", "--limit", "avg_bits<=3"], "neither a run directory nor a job"),
        (["resolve", "first"], "--limit"),
        (["resolve", "first", "--limit", "beauty<=3"], "'beauty'"),
        (["resolve", "first", "--limit", "avg_bits<=1"], "the least avg_bits of this space is"),
        (["compare", "first"], "at least two"),
        (["compare", "first", "absent"], "neither a run directory nor a job"),
        (["compare", "first", "other"], "the search texts differ"),
        (["compare", "first", "first", "--out", "home"], "exists already"),
        (["sensitivity", "first", "--windows", "4"], "--windows is for a model"),
        (["sensitivity"], "names no model"),
        (["sensitivity", "demo", "--out", "first"], "exists already"),
    ],
)
def test_a_refusal_is_one_line(command: Command, arguments: list[str], word: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert word in err
