"""Rules alone, and what each knob of their best earned: a whole search that ends after its guests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autoeff.errors import InputError
from autoeff.search.allocate import rule_job
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings


@pytest.fixture
def fields(tiny_job: Callable[..., JobSpec]) -> dict[str, object]:
    spec = tiny_job(objectives=["quality"], limits=["linear_bytes<=0.6x"]).model_dump(mode="json")
    return {name: spec[name] for name in ("model", "data", "eval_data", "objectives", "limits")}


def test_rules_are_measured_beside_the_baselines_and_nothing_is_searched(fields: dict[str, object], tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    spec = rule_job({**fields, "knobs": ["sparsity", "skip"]}, "owl,llm_drop,ilp", settings)
    result = start(spec, tmp_path / "run", settings)
    rows = {row["label"]: row for row in result.summary["rows"] if row["role"] == "seed"}
    additive = next(row for row in result.summary["rows"] if row["role"] == "additive")
    dense = result.summary["rows"][0]["costs"]["linear_bytes"]
    assert {"owl", "llm_drop"} & rows.keys()
    assert all(row["feasible"] and row["costs"]["linear_bytes"] <= 0.6 * dense and row["held_out"] is not None for row in rows.values())
    if "ilp" in rows:  # else it is the additive optimum itself, which is evaluated once
        assert rows["ilp"]["costs"] == additive["costs"]
    assert "searched" not in {row["origin"] for row in result.rows}
    earned = result.summary["attribution"]
    assert {row["knob"] for row in earned["rows"]} == {"sparsity", "skip"}
    assert all(row["costs"]["linear_bytes"] <= 0.6 * dense for row in earned["rows"])
    assert "What each knob earned" in (tmp_path / "run" / "report.html").read_text()


def test_knobs_follow_from_the_rules_unless_they_are_about_every_knob(fields: dict[str, object], tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    spec = rule_job(fields, "owl, llm_drop", settings)
    assert (list(spec.knobs), spec.seeds, spec.sampler) == (["sparsity", "skip"], ("owl", "llm_drop"), "none")
    for rules, message in {
        "ilp": "rule ilp is about every knob; name some with --knobs",
        "": "no rule is named; known: alphapruning, ",
        "lotto": "unknown allocator 'lotto'; known: alphapruning, ",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            rule_job(fields, rules, settings)
        assert "\n" not in str(error.value)
