"""Statistics against the inputs that linears really get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from autoeff.errors import InputError
from autoeff.evaluators.calibration import collected, gradients
from autoeff.spaces.material import dense_weight
from autoeff.spaces.sites import find_structure

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


def _load(folder: Path) -> nn.Module:
    kind = AutoModel if "bert" in folder.name else AutoModelForCausalLM
    model: nn.Module = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def _inputs(model: nn.Module, linears: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What every linear is fed, one after another, float64 [tokens, K]; padding left out."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    rows = torch.ones(0)

    def hook(name: str) -> Any:
        return lambda module, args: seen[name].append(args[0][rows].double())

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in linears]
    for batch in batches:
        rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _batches(*shapes: tuple[int, int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 160, shape, generator=generator)} for shape in shapes]


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@torch.no_grad()
def test_statistics_are_those_of_the_inputs_of_every_batch(tiny_models: dict[str, Path], family: str) -> None:
    model = _load(tiny_models[family])
    linears = [linear.name for linear in find_structure(model).linears]
    batches = _batches((2, 16), (3, 9), (1, 1))
    if family == "bert":
        batches[0]["attention_mask"] = torch.tensor([[1] * 16, [1] * 7 + [0] * 9])
    with collected(model, linears, {"hessian", "input_norm"}) as statistics:
        for batch in batches:
            model(**batch)
    found = statistics()
    assert found.keys() == {f"{name}.{statistic}" for name in linears for statistic in ("hessian", "input_norm")}
    for name, inputs in _inputs(model, linears, batches).items():
        expected = inputs.T @ inputs / len(inputs)
        assert found[f"{name}.hessian"].dtype == found[f"{name}.input_norm"].dtype == torch.float32
        torch.testing.assert_close(found[f"{name}.hessian"].double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
        torch.testing.assert_close(found[f"{name}.input_norm"].double(), inputs.norm(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@torch.no_grad()
def test_linears_that_are_fed_the_same_tensor_share_one_statistic(tiny_models: dict[str, Path], family: str) -> None:
    model = _load(tiny_models[family])
    structure = find_structure(model)
    with collected(model, [linear.name for linear in structure.linears], {"hessian"}) as statistics:
        for batch in _batches((2, 8), (2, 8)):
            model(**batch)
    found = statistics()
    sites = [site for site in structure.sites if site.kind == "linears"]
    for site in sites:
        assert len({found[f"{linear.name}.hessian"].data_ptr() for linear in site.linears}) == 1
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(sites)


@torch.no_grad()
def test_only_what_is_asked_for_is_collected_and_the_model_is_left_alone(tiny_models: dict[str, Path]) -> None:
    model = _load(tiny_models["llama"])
    linears = [linear.name for linear in find_structure(model).linears]
    batch = _batches((2, 8))[0]
    before = model(**batch).logits
    with collected(model, linears, {"input_norm"}) as statistics:
        assert torch.equal(model(**batch).logits, before)
    assert {name.rpartition(".")[2] for name in statistics()} == {"input_norm"}
    with collected(model, linears, ()) as statistics:
        model(**batch)
    assert statistics() == {}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_hooks_are_gone_after_an_error_inside(tiny_models: dict[str, Path]) -> None:
    model = _load(tiny_models["gpt2"])
    with pytest.raises(KeyError), collected(model, ["transformer.h.0.mlp.c_fc"], {"hessian"}):
        raise KeyError
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_gradients_are_those_of_the_mean_greatest_logit(tiny_models: dict[str, Path], family: str) -> None:
    """Against autograd through whole logits in float64, and with another chunk of the vocabulary."""
    model = _load(tiny_models[family])
    linears = find_structure(model).linears
    batch = _batches((3, 12))[0] | (
        {"attention_mask": torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11])} if family == "bert" else {}
    )
    model.requires_grad_(False)
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    found = gradients(model, linears, model.get_output_embeddings(), batch["input_ids"], batch.get("attention_mask"))
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr(), parameter.requires_grad, parameter.grad) == (before[name][0], False, None)
        assert torch.equal(parameter, before[name][1])
    exact = _load(tiny_models[family]).double()
    output = exact(**batch)
    logits = output.last_hidden_state if family == "bert" else output.logits
    outside = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 0
    logits.masked_fill(outside[:, :, None], -torch.inf).amax(1).mean().backward()
    assert found.keys() == {f"{linear.name}.gradient" for linear in linears}
    for linear in linears:
        expected = dense_weight(exact.get_parameter(linear.weight).grad, linear)
        gradient = found[f"{linear.name}.gradient"]
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_gradients_do_not_depend_on_how_the_vocabulary_is_cut(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = _load(tiny_models["llama"]), _batches((2, 9))[0]["input_ids"]
    linears = find_structure(model).linears[:2]
    whole = gradients(model, linears, model.get_output_embeddings(), ids, None)
    monkeypatch.setattr("autoeff.evaluators.calibration._CHUNK_LOGITS", 9 * 7)
    cut = gradients(model, linears, model.get_output_embeddings(), ids, None)
    assert len(whole) == 2
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_unknown_statistic_is_refused() -> None:
    refused = pytest.raises(InputError, match="unknown calibration statistic 'magic'; known: activation, .*covariance, .*gradient")
    with refused, collected(nn.Module(), [], {"magic"}):
        pass
