"""Served models, against candidates with decoded values in dense shapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoeff.evaluators import serving
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.serving import LowRankLinear, PackedLinear, copied, decoding, forms, prefilling, runs
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup
from autoeff.spaces.configuration import Level

IDS = torch.arange(12)[None] % 61
EXACT = 2e-5  # float32, in another order
BFLOAT16 = 6e-3  # of one product with bfloat16 activations; those of L linears add up like sqrt(L)


def logits(model: nn.Module, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS[:, :tokens])[0]
    return output.double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def decoded(evaluator: Evaluator, levels: dict[str, Level], tokens: int) -> torch.Tensor:
    evaluator.candidate.set(evaluator.space.indices(levels))
    return logits(evaluator.model, tokens)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2", "bert"])
def test_packed_model_gives_what_decoded_values_give(
    setup_of: Callable[..., EvaluationSetup], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(serving, "FEW_ROWS", {False: 8, True: 8})
    evaluator = Evaluator(setup_of(family, {"bits": {"group_size": 32}}))
    linears = len(evaluator.structure.linears)
    for level in (2, 3, 4, 6, 8):
        levels: dict[str, Level] = {d.key: level for d in evaluator.space.decisions if level in d.levels}
        model = evaluator.served({"it": levels})["it"]
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == linears
        # the packed kernel is for few rows; more are multiplied by the decoded weight
        assert error(logits(model, 8), decoded(evaluator, levels, 8)) < BFLOAT16 * linears**0.5
        assert error(logits(model, 12), decoded(evaluator, levels, 12)) < (EXACT if family in ("llama", "qwen3", "bert") else 2e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_cut_and_skipped_model_gives_what_zeros_give(setup_of: Callable[..., EvaluationSetup], family: str) -> None:
    """Group size 8 has no packed kernel on a CPU, so that all is float32 and every shape and step can be compared closely."""
    knobs = {"bits": {"group_size": 8}, "skip": {}, "width": {"multiple": 1}, "heads": {}, "sparsity": {}}
    evaluator = Evaluator(setup_of(family, knobs))
    rng = random.Random(1)
    for _ in range(4):
        indices = evaluator.space.sample(rng)
        levels = dict(evaluator.space.at(indices).levels)
        model = evaluator.served({"it": levels})["it"]
        assert error(logits(model, 12), decoded(evaluator, levels, 12)) < EXACT
        taken = forms(evaluator.structure, evaluator.space, evaluator.preparation.knobs, indices)
        for name, (form,) in taken.items():
            module = model.get_submodule(name) if not form.silenced else None
            if module is not None:
                assert (module.in_features, module.out_features) == (form.linear.in_features, form.linear.out_features)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert"])
def test_factors_are_served_as_two_linears_whatever_else_is_decided(
    setup_of: Callable[..., EvaluationSetup], family: str, tmp_path: Path
) -> None:
    """Ahead of codes and masks and behind cut units; what is stored packed is what the levels cost, and an export holds their product."""
    knobs = {"rank": {"multiple": 4}, "bits": {"group_size": 32}, "skip": {}, "width": {"multiple": 1}, "sparsity": {"ratios": (0.5,)}}
    evaluator = Evaluator(setup_of(family, knobs))
    rng, kinds = random.Random(2), set()
    for _ in range(6):
        indices = evaluator.space.sample(rng)
        levels = dict(evaluator.space.at(indices).levels)
        assert sum(evaluator.stored_bytes(levels).values()) == evaluator.space.primary(indices)["linear_bytes"]
        model = evaluator.served({"it": levels})["it"]
        linears = len(evaluator.structure.linears)
        assert error(logits(model, 8), decoded(evaluator, levels, 8)) < BFLOAT16 * linears**0.5
        for name, parts in forms(evaluator.structure, evaluator.space, evaluator.preparation.knobs, indices).items():
            if len(parts) == 2 and not parts[0].silenced:
                kinds.add(type(model.get_submodule(name)))
                assert parts[0].linear.of_model == parts[1].linear.of_model == name
    assert kinds == {LowRankLinear, nn.Sequential}
    measured = evaluator.evaluate(EvaluationRequest(levels, "search", 8))[0]
    evaluator.export(levels, tmp_path / "out")
    assert evaluator.remeasure(tmp_path / "out", "search", 8, levels)[0].value == pytest.approx(measured.value, rel=1e-6, abs=1e-9)


def test_encoder_sublayers_are_left_out_by_their_linears(setup_of: Callable[..., EvaluationSetup]) -> None:
    """BERT adds the stream and normalises inside the sublayer."""
    evaluator = Evaluator(setup_of("bert", {"skip": {}}))
    levels: dict[str, Level] = {d.key: "skip" for d in evaluator.space.decisions[::2]}
    model = evaluator.served({"it": levels})["it"]
    assert error(logits(model, 12), decoded(evaluator, levels, 12)) < EXACT


def test_model_that_knows_its_head_sizes_keeps_dense_shapes(setup_of: Callable[..., EvaluationSetup]) -> None:
    """GPT-2 splits its joint projection by numbers of its own."""
    evaluator = Evaluator(setup_of("gpt2", {"heads": {}, "width": {"multiple": 1}}))
    levels: dict[str, Level] = {d.key: d.levels[-1] for d in evaluator.space.decisions}
    model = evaluator.served({"it": levels})["it"]
    assert error(logits(model, 12), decoded(evaluator, levels, 12)) < EXACT


def test_a_device_without_memory_says_nothing_about_shapes() -> None:
    def fed(input_ids: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model: Any = nn.Linear(1, 1)
    model.forward = fed
    with pytest.raises(torch.OutOfMemoryError):
        runs(model)
    model.forward = lambda input_ids: input_ids @ input_ids[0, :1]
    assert not runs(model)


def test_copies_share_memory_and_not_modules(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    other = copied(model)
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in other.named_parameters())
    other.model.layers[0].mlp = nn.Identity()  # type: ignore[union-attr, index]
    assert not isinstance(model.model.layers[0].mlp, nn.Identity)  # type: ignore[union-attr, index]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "falcon", "qwen3_moe", "opt"])
def test_decoding_step_sees_the_whole_context_each_time(tiny_model: Callable[..., nn.Module], family: str) -> None:
    model: Any = tiny_model(family)
    call = decoding(model, 61, 2, 20)
    first, second = call(), call()
    assert torch.equal(first.logits, second.logits)  # type: ignore[attr-defined]
    assert first.logits.shape[:2] == (2, 1)  # type: ignore[attr-defined]
    assert second.past_key_values.get_seq_length() == 20  # type: ignore[attr-defined]


@pytest.mark.parametrize(("family", "context"), [("gpt2", 64), ("gpt2", 1), ("llama", 2)])
def test_contexts_at_the_ends_can_be_timed(tiny_model: Callable[..., nn.Module], family: str, context: int) -> None:
    """GPT-2 has 64 positions, and no more."""
    output: Any = decoding(tiny_model(family), 61, 1, context)()
    assert output.logits.isfinite().all()


def test_prefill_takes_every_token_and_gives_the_last(tiny_model: Callable[..., nn.Module]) -> None:
    output: Any = prefilling(tiny_model("llama"), 61, 2, 20)()
    assert output.logits.shape[:2] == (2, 1)
    assert output.past_key_values.get_seq_length() == 20
