"""Adapters of a setup: trained once and kept, each prefix a candidate, from scratch at given ranks, written as PEFT reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from autoeff.errors import CandidateError, FailureClass, InputError
from autoeff.evaluators import super_adapter, training
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.peft_format import CONFIG
from autoeff.evaluators.preparation import prepare
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.adapters import adapter_of

KNOB: dict[str, Any] = {"ranks": (4, 2, 0), "tokens": 3000, "batch": 8, "learning_rate": 0.02}
WORDS = "the dog sat on the mat and the cat ate the hat while all the others went there again\n"
SetupOf = Callable[..., EvaluationSetup]


@pytest.fixture
def tuning(setup_of: SetupOf, tmp_path: Path) -> SetupOf:
    """A setup that tunes a tiny model to a text of few words, with other knobs by name."""
    text = tmp_path / "tune.txt"
    text.write_text(WORDS * 80)

    def make(family: str = "llama", **knobs: dict[str, Any]) -> EvaluationSetup:
        setup = setup_of(family, {"lora_rank": KNOB, **knobs})
        return replace(setup, data=TextSpec(None, 8, 16), tune_data=TextSpec(str(text), None, 16))

    return make


def ranks(evaluator: Evaluator, *chosen: int) -> dict[str, int]:
    """Levels that repeat the chosen ones over the decisions about adapters."""
    keys = [decision.key for decision in evaluator.space.decisions if decision.knob == "lora_rank"]
    return {key: chosen[i % len(chosen)] for i, key in enumerate(keys)}


def values(evaluator: Evaluator, levels: dict[str, Any], split: Any = "held_out") -> dict[str, float]:
    windows = len(evaluator.preparation.passages[split].inputs)
    return {m.name: m.value for m in evaluator.evaluate(EvaluationRequest(levels, split, windows))}


@pytest.fixture
def trained(tuning: SetupOf) -> Evaluator:
    return Evaluator(tuning())


def test_every_prefix_is_an_adapter_and_the_whole_is_what_others_are_compared_with(trained: Evaluator) -> None:
    found = {rank: values(trained, ranks(trained, rank)) for rank in (4, 2, 0)}
    assert found[4]["kl_held_out"] == 0.0 < found[2]["kl_held_out"] < found[0]["kl_held_out"]
    assert found[4]["loss_held_out"] < found[0]["loss_held_out"] - 0.1
    assert found[2]["loss_held_out"] < found[0]["loss_held_out"] - 0.1
    base = AutoModelForCausalLM.from_pretrained(trained.preparation.facts.path, dtype=torch.float32)
    ids = trained.preparation.passages["held_out"].inputs
    with torch.no_grad():
        expected = float(base(ids, labels=ids).loss)
    assert found[0]["loss_held_out"] == pytest.approx(expected, rel=1e-5)  # rank 0 is the checkpoint
    order = [ranks(trained, 2, 0, 4), ranks(trained, 0, 4), ranks(trained, 4), ranks(trained, 2)]
    before = [values(trained, levels, "search") for levels in order]
    assert [values(trained, levels, "search") for levels in reversed(order)] == before[::-1]


def test_the_text_is_divided_between_training_search_and_what_is_held_out(trained: Evaluator, tuning: SetupOf, tmp_path: Path) -> None:
    texts = trained.preparation.report()["text"]
    assert [texts[split]["source"].rpartition(", ")[2] for split in ("tune", "search", "held_out")] == [
        "its first three fifths", "its fourth fifth", "its last fifth",
    ]  # fmt: skip
    other = tmp_path / "other.txt"
    other.write_text(WORDS * 30)
    apart = prepare(replace(tuning(), data=TextSpec(str(other), 8, 16))).report()["text"]
    assert [apart[split]["source"] for split in ("tune", "search")] == [str(tmp_path / "tune.txt"), f"{other}, its first four fifths"]


def test_what_the_bank_is_told_of_inputs_is_said_of_one_tuned_model(tuning: SetupOf) -> None:
    """Codes that go by statistics of one adapter are not taken for those of another."""
    setup = tuning(bits={"group_size": 16, "quantizer": "gptq"})
    faster = replace(setup, space=replace(setup.space, knobs={**setup.space.knobs, "lora_rank": {**KNOB, "learning_rate": 0.01}}))
    fewer = replace(setup, space=replace(setup.space, levels={"*:lora_rank": (4, 0)}))
    digests = {prepare(s).passages["search"].digest for s in (setup, setup, faster, fewer, replace(setup, seed=1))}
    assert len(digests) == 4


def test_a_trained_adapter_is_found_again_and_a_killed_training_resumed(
    tuning: SetupOf, trained: Evaluator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps: list[int] = []
    step_taken = training.Course.rate

    def watched(course: training.Course, step: int, total: int) -> float:
        steps.append(step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return step_taken(course, step, total)

    expected = adapters(trained)
    monkeypatch.setattr(training.Course, "rate", watched)
    assert torch.equal(adapters(Evaluator(tuning())), expected)
    assert steps == []
    with pytest.raises(KeyboardInterrupt):
        Evaluator(replace(tuning(), bank=str(tmp_path / "elsewhere")))
    again = Evaluator(replace(tuning(), bank=str(tmp_path / "elsewhere")))
    assert steps[10] > 5
    assert torch.equal(adapters(again), expected)


def adapters(evaluator: Evaluator) -> Tensor:
    found = [adapter_of(module) for module in evaluator.model.modules()]
    return torch.cat([part.flatten() for adapter in found if adapter is not None for part in (adapter.a, adapter.b)])


def test_adapters_from_scratch_are_measured_and_the_super_adapter_comes_back(trained: Evaluator) -> None:
    levels = ranks(trained, 2, 0, 4)
    before = values(trained, levels)
    scratch = {m.name: m.value for m in trained.trained(levels)}
    assert scratch.keys() == {"kl_held_out", "loss_held_out", "perplexity_held_out"}
    assert scratch["loss_held_out"] != before["loss_held_out"]
    assert scratch["loss_held_out"] < values(trained, ranks(trained, 0))["loss_held_out"] - 0.1
    assert values(trained, levels) == before
    assert {m.name: m.value for m in trained.trained(levels)} == scratch


def test_a_training_from_scratch_that_fails_leaves_the_super_adapter(trained: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*_: object) -> list[float]:
        raise CandidateError(FailureClass.NAN, "step 3 of training has a loss of nan")

    before = values(trained, ranks(trained, 2, 4))
    monkeypatch.setattr(super_adapter, "train", diverging)
    with pytest.raises(CandidateError, match="step 3"):
        trained.trained(ranks(trained, 2, 4))
    assert values(trained, ranks(trained, 2, 4)) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks transformers 5 for it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_what_is_written(tuning: SetupOf, family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    evaluator = Evaluator(tuning(family))
    levels = ranks(evaluator, 2, 0, 4)
    expected = values(evaluator, levels)
    evaluator.export_adapter(levels, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {2, 4}
    base = AutoModelForCausalLM.from_pretrained(evaluator.preparation.facts.path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = evaluator.preparation.passages["held_out"].inputs
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(expected["loss_held_out"], rel=1e-5)
    fresh = Evaluator(tuning(family)).remeasure_adapter(tmp_path / "adapter", "held_out", len(ids))
    assert {m.name: m.value for m in fresh} == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_adapters_on_coded_linears_are_exported_beside_the_checkpoint(tuning: SetupOf, tmp_path: Path) -> None:
    evaluator = Evaluator(tuning("qwen2", bits={"group_size": 16}))
    coded = {d.key: 4 for d in evaluator.space.decisions if d.knob == "bits"}
    levels = {**coded, **ranks(evaluator, 2, 0, 4)}
    expected = values(evaluator, levels, "search")
    assert expected["kl"] > values(evaluator, ranks(evaluator, 2, 0, 4), "search")["kl"]
    evaluator.export(levels, tmp_path / "out")
    found = evaluator.remeasure(tmp_path / "out", "search", 8, levels)
    assert found[0].value == pytest.approx(expected["kl"], rel=1e-6, abs=1e-9)
    bare = Evaluator(tuning("qwen2", bits={"group_size": 16}))
    nothing = ranks(bare, 0)
    expected = values(bare, nothing, "search")
    bare.export(nothing, tmp_path / "bare")
    assert not (tmp_path / "bare" / "adapter").exists()
    assert bare.remeasure(tmp_path / "bare", "search", 8, nothing)[0].value == pytest.approx(expected["kl"], rel=1e-6)


def test_what_cannot_be_trained_is_refused(tuning: SetupOf, setup_of: SetupOf, trained: Evaluator, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="knob lora_rank trains adapters and needs text to do so; give --tune-data"):
        prepare(replace(tuning(), tune_data=None))
    with pytest.raises(InputError, match="tune_data is text that adapters are trained on; add lora_rank"):
        prepare(replace(setup_of("llama", {"bits": {}}), tune_data=tuning().tune_data))
    with pytest.raises(InputError, match="knob lora_rank trains adapters of decoders"):
        prepare(tuning("bert"))
    with pytest.raises(InputError, match="has rank 0: there is nothing to write"):
        trained.export_adapter(ranks(trained, 0), tmp_path / "none")
