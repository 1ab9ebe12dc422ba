"""Every family through a whole search: found, exported, loaded by transformers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from autoeff.search.job import JobSpec
from autoeff.search.run import export, start
from autoeff.search.settings import Settings


# Forms that differ: fused projections, parallel residuals, an encoder, experts. The others differ in names only, which candidates of
# every family are tested with in tests/evaluators/test_families.py.
@pytest.mark.parametrize("every_family", ["phi3", "gpt_neox", "roberta", "qwen2_moe"], indirect=True)
def test_a_search_ends_with_an_export_that_transformers_loads(every_family: str, stored_family: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the dog sat on the mat and the cat ate the hat while all the others went there again\n" * 40)
    knobs = {
        "bits": {"group_size": 16},
        "skip": {},
        "sparsity": {"criterion": "magnitude", "ratios": [0.5]},
        "width": {"criterion": "magnitude"},
    }
    job = {
        "model": str(stored_family), "data": {"source": str(text), "windows": 4, "length": 12}, "knobs": knobs,
        "limits": ["linear_bytes<=0.35x"], "budget": {"trials": 32},
    }  # fmt: skip
    settings = Settings(home=tmp_path / "home")
    result = start(JobSpec.parse(job), tmp_path / "run", settings)
    assert result.exit_code == 0
    assert result.summary["rows"][0]["search"] == 0.0
    exported = export(tmp_path / "run", result.summary["found"], tmp_path / "out", "hf-dense", settings)
    assert exported["measured"] == pytest.approx(exported["trial"], rel=1e-5, abs=1e-8)
    architecture = getattr(transformers, transformers.AutoConfig.from_pretrained(tmp_path / "out").architectures[0])
    _, said = architecture.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
