"""The script that trains the bundled models: what it reads, how it balances experts, and that it resumes as if never interrupted."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "examples"))
    return importlib.import_module("train_demo")


def balance_by_hand(logits: Tensor, chosen: int) -> float:
    """Experts times the sum over experts of (choices per token) x (mean probability), in float64."""
    tokens, experts = logits.shape
    probabilities = logits.double().softmax(-1)
    choices = torch.zeros(experts, dtype=torch.float64)
    for row in probabilities:
        choices[row.topk(chosen).indices] += 1 / tokens
    return float(experts * (choices * probabilities.mean(0)).sum())


def test_search_and_held_out_text_are_kept_out_of_training(script: ModuleType) -> None:
    files = script.training_files()
    assert {"python", "sqlalchemy"} <= {owner for owner, _ in files}
    for package in script.TEXT_PACKAGES.values():
        own = {Path(str(file.locate())).resolve() for file in importlib.metadata.files(package) or [] if str(file).endswith(".py")}
        assert len(own) > 50
        assert not own & {path.resolve() for _, path in files}


def test_balance_loss_is_the_mean_of_the_layers_and_hides_no_dead_expert(script: ModuleType) -> None:
    config = MixtralConfig(num_local_experts=4, num_experts_per_tok=2)
    layers = tuple(torch.randn(33, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = sum(balance_by_hand(logits, 2) for logits in layers) / 2
    assert float(script.balance_loss(config, layers)) == pytest.approx(expected, rel=1e-6)
    first = torch.tensor([[9.0, 9.0, 0.0, 0.0]]).expand(8, 4)  # each layer leaves two experts idle, though not the same two
    assert float(script.balance_loss(config, (first, first.flip(-1)))) == pytest.approx(4.0, rel=1e-3)


def test_every_phase_of_a_recipe_holds_as_many_tokens_a_step(script: ModuleType) -> None:
    for recipe in script.RECIPES.values():
        assert {phase.length * phase.batch for phase in recipe.phases} == {recipe.step_tokens}
        assert sum(phase.share for phase in recipe.phases) == 1
    moe = script.RECIPES["demo-moe"].config
    assert (moe.num_local_experts, moe.num_experts_per_tok) == (8, 2)


def test_learning_rate_ends_where_training_ends(script: ModuleType) -> None:
    training = script.Training(steps=1000)
    rates = [training.learning_rate(step) for step in range(1000)]
    assert max(rates) == rates[200] == rates[649] == training.peak_learning_rate
    assert rates[-1] == pytest.approx(training.peak_learning_rate / 50)
    assert rates[:200] == sorted(rates[:200])
    assert rates[649:] == sorted(rates[649:], reverse=True)


def test_a_resumed_training_equals_an_uninterrupted_one(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(f"def name_{i}(value_{i}):\n    return value_{i} + {i}\n" for i in range(200))
    monkeypatch.setattr(script, "training_documents", lambda: ([code, code[::-1]], {}))
    recipe = script.RECIPES["demo-moe"]
    config = MixtralConfig(**{**recipe.config.to_dict(), "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2})
    phases = (script.Phase(0.75, 64, 4), script.Phase(0.25, 128, 2))
    monkeypatch.setitem(script.RECIPES, "demo-moe", replace(recipe, config=config, phases=phases))
    threads = torch.get_num_threads()
    try:
        for steps, work in [(4, "whole"), (2, "parts"), (4, "parts")]:  # both are still warming up: the same learning rates
            script.train(script.Training(steps, "demo-moe", threads=1), tmp_path / work)
    finally:
        torch.set_num_threads(threads)
    whole, parts = (script.trained_model("demo-moe", tmp_path / work).state_dict() for work in ("whole", "parts"))
    torch.manual_seed(0)
    fresh = script.RECIPES["demo-moe"].make_model().state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert all(not torch.equal(whole[name], fresh[name]) for name in whole)


def test_what_is_installed_later_does_not_change_the_text_of_a_training(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "training_documents", lambda: (["x = 1\n"], {"files": 1}))
    first = script.kept_documents(tmp_path)
    monkeypatch.setattr(script, "training_documents", lambda: (["x = 1\n", "y = 2\n"], {"files": 2}))
    assert script.kept_documents(tmp_path) == first == (["x = 1\n"], {"files": 1})
