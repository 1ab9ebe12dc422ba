"""Every family through a whole search: found, exported, loaded by transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from autoeff.search.job import JobSpec
from autoeff.search.run import Result, export, start
from autoeff.search.settings import Settings


def test_a_search_of_a_model_of_images_ends_with_an_export_that_transformers_loads(
    tiny_vit: Path, tiny_images: Path, tmp_path: Path
) -> None:
    result = search_and_export(tiny_vit, tiny_images, tmp_path, tasks={"max_degradation": 0.5})
    rows = {row["role"]: row for row in result.summary["rows"] if row["held_out"] is not None}
    assert rows["found"]["accuracy:labels"] >= 0.5 * rows["dense"]["accuracy:labels"] > 0


def test_factors_are_searched_with_their_bits(tiny_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    knobs = {"rank": {"multiple": 2, "shares": [0.75, 0.4]}, "bits": {"group_size": 16}, "skip": {}}
    space = {"exclude": ["*layers.[12]*"], "levels": {"*:bits": [16, 8, 4]}}
    job = tiny_job(knobs=knobs, space=space, limits=["linear_bytes<=0.85x"], budget={"trials": 22})
    settings = Settings(home=tmp_path / "home")
    result = start(job, tmp_path / "run", settings)
    assert result.exit_code == 0
    searched = [row for row in result.rows if row["origin"] == "searched" and "kl" in row["measurements"]]
    assert any(key.endswith(":rank") and level != 1 for row in searched for key, level in row["configuration"].items())


@pytest.mark.slow
def test_a_search_of_every_family_ends_with_an_export_that_transformers_loads(stored_family: Path, tiny_text: Path, tmp_path: Path) -> None:
    assert search_and_export(stored_family, tiny_text, tmp_path).found is not None


def search_and_export(model: Path, text: Path, tmp_path: Path, **fields: object) -> Result:
    knobs = {
        "bits": {"group_size": 16},
        "skip": {},
        "sparsity": {"criterion": "magnitude", "ratios": [0.5]},
        "width": {"criterion": "magnitude"},
    }
    if model.name in ("mixtral", "qwen3_moe", "olmoe"):  # all their neurons are experts', which no width cuts
        del knobs["width"]
    job = {
        "model": str(model), "data": {"source": str(text), "windows": 4, "length": 12}, "knobs": knobs,
        "limits": ["linear_bytes<=0.35x"], "budget": {"trials": 32},
    }  # fmt: skip
    settings = Settings(home=tmp_path / "home")
    result = start(JobSpec.parse(job | fields), tmp_path / "run", settings)
    assert result.exit_code == 0
    assert result.summary["rows"][0]["search"] == 0.0
    exported = export(tmp_path / "run", result.summary["found"], tmp_path / "out", "hf-dense", settings)
    assert exported["measured"] == pytest.approx(exported["trial"], rel=1e-5, abs=1e-8)
    architecture = getattr(transformers, transformers.AutoConfig.from_pretrained(tmp_path / "out").architectures[0])
    _, said = architecture.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return result
