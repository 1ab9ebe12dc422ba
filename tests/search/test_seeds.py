"""Rules for the cache in a whole search: guests at the budget of the limit, found again on resume, exported with what was searched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeff.search.coordinator import Progress
from autoeff.search.job import JobSpec
from autoeff.search.model import plan
from autoeff.search.run import export, resume, start
from autoeff.search.settings import Settings

RULES = {"cake", "prefixkv", "pyramidkv"}


@pytest.fixture
def cache_job(tiny_job: Callable[..., JobSpec], tiny_text: Path) -> Callable[..., JobSpec]:
    """A job over weights and cache under one limit."""

    def make(**fields: object) -> JobSpec:
        text = {"source": str(tiny_text), "windows": 4, "length": 64}
        return tiny_job(
            data=text,
            eval_data=text | {"draw": "first"},
            knobs={"kv_budget": {"shares": [0.5, 0.25, 0.125]}, "bits": {"group_size": 16}},
            space={"levels": {"*:bits": [16, 4]}},
            objectives=["quality"],
            limits=["bytes_per_token<=0.5x"],
            budget={"trials": 40},
            batch=4,
            **fields,
        )

    return make


@pytest.mark.slow
def test_rules_are_guests_at_the_limit_and_a_resumed_search_makes_the_same(cache_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")

    def stop(progress: Progress) -> None:
        if progress.phase == "search":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(cache_job(), tmp_path / "run", settings, stop)
    result = resume(tmp_path / "run", settings)  # it would refuse guests other than those that are stored
    rows = [row for row in result.summary["rows"] if row["role"] == "seed"]
    dense = result.summary["rows"][0]["costs"]["bytes_per_token"]
    assert rows
    assert {row["label"] for row in rows} <= RULES
    assert all(row["feasible"] and row["costs"]["bytes_per_token"] <= dense / 2 and row["held_out"] is not None for row in rows)
    labels = [row["label"] for row in result.summary["rows"] if row["role"] == "uniform"]
    assert labels == ["kv_budget=0.5", "kv_budget=0.25", "kv_budget=0.125", "bits=4"]
    found = next(row for row in result.rows if row["trial"] == result.summary["found"])
    assert {key.rpartition(":")[2] for key, level in found["configuration"].items() if level not in (1, 16)} == {"kv_budget", "bits"}

    exported = export(tmp_path / "run", result.summary["found"], tmp_path / "out", "hf-dense", settings)
    assert exported["measured"] == pytest.approx(exported["trial"], rel=1e-4, abs=1e-6)
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["configuration"] == found["configuration"]


def test_seeds_are_chosen_by_name_and_without_a_model_at_hand_only_those_that_need_none(
    cache_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path / "home")
    for seeds, expected in ((None, {"pyramidkv"}), ("none", set()), ("pyramidkv", {"pyramidkv"})):
        planned = plan(cache_job(seeds=seeds), settings)
        guests = planned.guests(None)
        labels: set[str | None] = set()
        batch = next(guests)
        while True:
            labels |= {candidate.label for candidate in batch if candidate.origin == "seed"}
            try:
                batch = guests.send([0.01 * sum(candidate.indices) for candidate in batch])
            except StopIteration:
                break
        assert labels == expected
