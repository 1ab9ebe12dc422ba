"""A model whose matrices are kept in 16 bits computes bit for bit what one in float32 computes, and holds half of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.loading import inspect_model, load_model
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.evaluators.widening import narrow_names, scratch_elements, wide_for_gradients
from autoeff.spaces.sites import find_structure
from autoeff.spaces.space import SpaceSpec

SetupOf = Callable[..., EvaluationSetup]
CPU = torch.device("cpu")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr("autoeff.evaluators.loading._WIDE_BYTES", 0)


def values(evaluator: Evaluator) -> list[float]:
    rng, windows = random.Random(0), len(evaluator.preparation.passages["search"].inputs)
    drawn = [(0,) * len(evaluator.space.decisions), *(evaluator.space.sample(rng) for _ in range(3))]
    return [
        m.value
        for split in ("search", "held_out")
        for indices in drawn
        for m in evaluator.evaluate(EvaluationRequest(evaluator.space.at(indices).levels, split, windows))  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("every_family", ["llama", "gpt2", "phi3", "opt", "bert", "qwen2_moe"], indirect=True)  # forms that differ
def test_every_family_gives_the_same_values(stored_family: Path, tmp_path: Path, narrow: Callable[[], None]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the dog sat on the mat and the cat ate the hat while all the others went there again\n" * 40)
    data = TextSpec(str(text), windows=4, length=12)
    knobs = {"bits": {"group_size": 8}, "skip": {}}
    setup = EvaluationSetup(str(stored_family), data, data, SpaceSpec(knobs), 0, "cpu", str(tmp_path / "bank"))
    wide = Evaluator(setup)
    expected = values(wide)
    narrow()
    evaluator = Evaluator(setup)
    kept = evaluator.preparation.footprint.narrow
    assert {linear.weight for linear in evaluator.structure.linears} <= kept
    dtypes = {name: parameter.dtype for name, parameter in evaluator.model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float16} == kept
    assert values(evaluator) == expected
    assert values(evaluator)[0] == 0.0
    ids = wide._texts["search"].passages.inputs[:2]
    if evaluator._head is not None:
        assert torch.equal(evaluator.model(input_ids=ids).logits, wide.model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "bert"])
def test_an_export_measures_what_the_candidate_measured(setup_of: SetupOf, family: str, tmp_path: Path, narrow: Callable[[], None]) -> None:
    narrow()
    setup = setup_of(family, {"bits": {"group_size": 16}, "skip": {}})
    evaluator = Evaluator(setup)
    indices = evaluator.space.sample(random.Random(4))
    levels = evaluator.space.at(indices).levels
    expected = evaluator.evaluate(EvaluationRequest(levels, "search", 8))[0].value
    before = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}
    evaluator.export(levels, tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in evaluator.model.state_dict().items())
    assert Evaluator(setup).remeasure(tmp_path / "out", "search", 8)[0].value == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_16_bit_weights_stay_mapped_from_the_checkpoint(tiny_models: dict[str, Path]) -> None:
    facts = inspect_model(tiny_models["mistral"])
    structure = find_structure(load_model(facts, CPU))
    before = load_model(facts, CPU, narrow_names(load_model(facts, CPU), structure.linears))
    path = (tiny_models["mistral"] / "model.safetensors").resolve()
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    mapped = [(int(start, 16), int(end, 16)) for start, end in spans]
    for linear in structure.linears:
        place = before.get_parameter(linear.weight).data_ptr()
        assert any(start <= place < end for start, end in mapped), linear.name


def test_an_embedding_that_scales_and_its_head_stay_wide(tiny_model: Callable[..., nn.Module]) -> None:
    gemma, llama = tiny_model("gemma3_text"), tiny_model("llama")
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert not tables & narrow_names(gemma, find_structure(gemma).linears)
    assert tables <= narrow_names(llama, find_structure(llama).linears)
    assert scratch_elements(llama, narrow_names(llama, find_structure(llama).linears)) == 40 * 32


def test_a_gpu_computes_gradients_of_float16_weights_in_float32(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama").to("meta", torch.float16)  # where no numbers are needed
    model.get_parameter("lm_head.weight").data = torch.empty(40, 32, dtype=torch.bfloat16, device="meta")
    before = {name: (parameter, parameter.dtype) for name, parameter in model.named_parameters()}
    with wide_for_gradients(model):
        assert {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.dtype != torch.float32} == {
            "lm_head.weight": torch.bfloat16
        }
    assert all(model.get_parameter(name) is parameter and parameter.dtype == dtype for name, (parameter, dtype) in before.items())
    on_cpu = tiny_model("llama").half()
    with wide_for_gradients(on_cpu):
        assert on_cpu.get_parameter("lm_head.weight").dtype == torch.float16
