"""The user's own metrics: which functions are found, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autoeff.errors import CandidateError, InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.metrics import check_metrics, imported_metrics, measured_by
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.space import SpaceSpec

SOURCE = """
def silence(model, tokenizer):
    zeros = sum(int((p == 0).all()) for name, p in model.named_parameters() if name.endswith("o_proj.weight"))
    return {"silent": zeros, "words": len(tokenizer("the cat")["input_ids"])}

def broken(model, tokenizer):
    raise RuntimeError("no luck")

def endless(model, tokenizer):
    return float("inf")

def wordy(model, tokenizer):
    return "many"

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the module `my_metrics`."""
    (tmp_path / "my_metrics.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "my_metrics.py"
    sys.modules.pop("my_metrics", None)


def test_a_finalist_is_measured_as_the_model_stands(module: Path, tiny_models: dict[str, Path], tiny_text: Path) -> None:
    text = TextSpec(str(tiny_text), windows=4, length=12)
    setup = EvaluationSetup(
        str(tiny_models["llama"]),
        text,
        None,
        SpaceSpec({"skip": {}}),
        0,
        "cpu",
        str(module.parent / "bank"),
        metrics=("my_metrics:silence",),
    )
    evaluator = Evaluator(setup)
    space = evaluator.space
    levels = {d.key: d.levels[1 if d.site == "model.layers.1.self_attn" else 0] for d in space.decisions}

    def own(split: Any, windows: int) -> dict[str, float]:
        return {item.name: item.value for item in evaluator.evaluate(EvaluationRequest(levels, split, windows)) if item.own}

    assert own("held_out", 4) == {"silent": 1.0, "words": len(evaluator_words(setup))}
    assert own("held_out", 2) == own("search", 4) == {}


def evaluator_words(setup: EvaluationSetup) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(setup.model)("the cat")["input_ids"])


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("my_metrics", "write package.module:function"),
        ("my_metrics:absent", "has no function 'absent'"),
        ("my_metrics:number", "has no function 'number'"),
        ("no_such_module:f", "cannot import the metric 'no_such_module:f'"),
        ("../my_metrics:silence", "write package.module:function"),
    ],
)
def test_what_is_no_function_is_refused(module: Path, reference: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        imported_metrics([reference])


@pytest.mark.parametrize(("name", "says"), [("broken", "RuntimeError: no luck"), ("endless", "is inf"), ("wordy", "not a number")])
def test_a_metric_that_fails_fails_the_candidate(module: Path, name: str, says: str) -> None:
    with pytest.raises(CandidateError, match=says):
        measured_by(imported_metrics([f"my_metrics:{name}"]), None, None)


def test_a_device_that_fails_within_a_metric_is_not_the_metrics_failure() -> None:
    def unlucky(model: object, tokenizer: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        measured_by({"unlucky": unlucky}, None, None)


def test_two_of_one_name_are_refused_and_the_digest_follows_the_source(module: Path) -> None:
    with pytest.raises(InputError, match="two metrics are called 'silence'"):
        imported_metrics(["my_metrics:silence", "my_metrics:silence"])
    before = check_metrics(["my_metrics:silence"])
    module.write_text(SOURCE + "\n# changed\n")
    sys.modules.pop("my_metrics")
    assert check_metrics(["my_metrics:silence"]) != before
