"""A whole search of ranks: limits, guests, finalists from scratch, and the export, measured again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoeff.errors import InputError
from autoeff.search.exporters.peft import Peft
from autoeff.search.job import JobSpec
from autoeff.search.run import Result, export, start
from autoeff.search.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def result(tiny_job: Callable[..., JobSpec], tiny_text: Path, tmp_path: Path, settings: Settings) -> Result:
    job = tiny_job(
        data={"windows": 4, "length": 16},
        eval_data=None,
        tune_data={"source": str(tiny_text), "length": 16},
        knobs={"lora_rank": {"ranks": [4, 1, 0], "tokens": 800, "learning_rate": 0.02}},
        space={"exclude": ["*layers.[12]*"]},
        limits=["trainable_parameters<=0.5x"],
        budget={"trials": 12},
    )
    return start(job, tmp_path / "run", settings)


def test_ranks_are_searched_and_finalists_trained_from_scratch(result: Result) -> None:
    assert result.exit_code == 0
    found = result.found
    assert found is not None
    values = found["measurements"]
    dense = next(row for row in result.rows if row["origin"] == "dense")["measurements"]["trainable_parameters"]["value"]
    assert 0 < values["trainable_parameters"]["value"] <= 0.5 * dense
    assert any(row.get("label") == "eva" for row in result.rows)
    rows = {row["role"]: row for row in result.summary["from_scratch"]}
    assert rows["found"]["trial"] == found["trial"]
    assert rows["found"]["prefix"] == values["loss_held_out"]["value"]
    assert rows["found"]["from_scratch"] not in (None, rows["found"]["prefix"])


@pytest.mark.slow
def test_an_export_is_what_was_searched(result: Result, settings: Settings, tmp_path: Path) -> None:
    assert result.found is not None
    exported = export(tmp_path / "run", result.found["trial"], tmp_path / "out", "peft", settings)
    assert set(exported["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert exported["measured"] == pytest.approx(exported["trial"], rel=1e-5, abs=1e-8)


def test_only_searches_of_ranks_alone_fit_into_an_adapter(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(spec={"knobs": {"bits": {}, "lora_rank": {}}})
    nobody: Any = None
    with pytest.raises(InputError, match="an adapter alone does not hold what was decided about bits; export with --format hf-dense"):
        Peft().write(job, nobody, nobody, tmp_path)
