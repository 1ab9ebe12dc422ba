"""The prediction of seconds runs on every family, and follows what there is to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.loading import inspect_model, one_block
from autoeff.evaluators.preparation import prepare
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


def test_a_bank_that_is_built_takes_no_time_and_more_text_takes_more(setup_of: SetupOf, tmp_path: Path) -> None:
    setup = setup_of("llama", {"bits": {"group_size": 16}, "skip": {}})
    before = predict_seconds(prepare(setup), tmp_path / "bank")
    assert before.bank > 0
    assert before.evaluation > 0
    assert before.search(10) == before.opening + before.bank + 10 * before.evaluation
    Evaluator(setup)
    assert predict_seconds(prepare(setup), tmp_path / "bank").bank == 0
    more = prepare(replace(setup, eval_data=setup.data, data=replace(setup.data, windows=80)))
    assert predict_seconds(more, tmp_path / "bank").evaluation > before.evaluation


def test_every_kind_of_level_is_sampled(setup_of: SetupOf, tmp_path: Path) -> None:
    for settings in ({"quantizer": "gptq"}, {"store": "nested"}):
        knobs = {"bits": {**settings, "group_size": 16}, "sparsity": {"criterion": "wanda"}, "width": {"criterion": "magnitude"}}
        assert predict_seconds(prepare(setup_of("llama", knobs)), tmp_path / "bank").bank > 0
