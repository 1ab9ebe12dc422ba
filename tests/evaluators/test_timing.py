"""The prediction of seconds runs on every family, and follows what there is to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.loading import inspect_model, one_block
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.evaluators.timing import predict_seconds

SetupOf = Callable[..., EvaluationSetup]


def test_one_block_of_every_family_runs(stored_family: Path) -> None:
    facts = inspect_model(stored_family)
    model = one_block(facts, torch.device("cpu"))
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert sum(p.numel() for p in model.parameters()) < facts.parameters
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_bank_that_is_built_takes_no_time(setup_of: SetupOf, tmp_path: Path) -> None:
    setup = setup_of("llama", {"bits": {"group_size": 16}, "skip": {}})
    before = predict_seconds(prepare(setup), tmp_path / "bank")
    assert before.bank > 0
    assert before.evaluation > 0
    assert before.search(10) == before.opening + before.bank + 10 * before.evaluation
    Evaluator(setup)
    assert predict_seconds(prepare(setup), tmp_path / "bank").bank == 0


def test_samples_are_scaled_to_the_whole(setup_of: SetupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"_body_s": 1.0, "_head_s": 2.0, "_level_s": (3.0, 0.0), "_write_s": 0.0}.items():
        monkeypatch.setattr(f"autoeff.evaluators.timing.{name}", lambda *_, seconds=seconds: seconds)
    setup = setup_of("llama", {"bits": {"group_size": 16}}, windows=6)
    preparation = prepare(setup)
    weights = sum(linear.parameters for linear in preparation.structure.linears)
    found = predict_seconds(preparation, tmp_path / "bank")
    assert found.evaluation == 6 * 16 * (1.0 * weights + 2.0 * 160 * 32)
    levels = sum((len(decision.levels) - 1) * weights_of(preparation, decision.site) for decision in preparation.space.decisions)
    assert found.bank == pytest.approx(3.0 * levels)


def weights_of(preparation: Preparation, name: str) -> int:
    return next(site.parameters for site in preparation.structure.sites if site.name == name)


def test_attention_in_rounds_counts_where_caches_are_decided_about(
    setup_of: SetupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"_body_s": 0.0, "_head_s": 0.0, "_level_s": (0.0, 0.0), "_write_s": 0.0}.items():
        monkeypatch.setattr(f"autoeff.evaluators.timing.{name}", lambda *_, seconds=seconds: seconds)
    without, with_cache = (
        predict_seconds(prepare(setup_of("llama", {"skip": {}, **knobs})), tmp_path / "bank").evaluation
        for knobs in ({}, {"kv_budget": {"shares": (0.5,)}})
    )
    assert with_cache > without == 0


def test_every_kind_of_level_is_sampled(setup_of: SetupOf, tmp_path: Path) -> None:
    for settings, criterion in (({"quantizer": "gptq"}, "wanda"), ({"store": "nested"}, "nirvana")):
        knobs = {"bits": {**settings, "group_size": 16}, "sparsity": {"criterion": criterion}, "width": {"criterion": "magnitude"}}
        assert predict_seconds(prepare(setup_of("llama", knobs)), tmp_path / "bank").bank > 0
    of_model: dict[str, dict[str, object]] = {"kv_rank": {"multiple": 2}, "activation_sparsity": {}, "bits": {"group_size": 16}}
    assert predict_seconds(prepare(setup_of("llama", of_model)), tmp_path / "bank").bank > 0
