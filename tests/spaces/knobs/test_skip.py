from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoeff.spaces.knobs.skip import Skip
from autoeff.spaces.sites import Structure, find_structure

MakeModel = Callable[..., nn.Module]
TOKENS = torch.tensor([[5, 3, 8, 9, 7]])


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def _zeros(value: object) -> object:
    """`value` with its first tensor zeroed."""
    return (_zeros(value[0]), *value[1:]) if isinstance(value, tuple) else torch.zeros_like(value)


def _silenced(model: nn.Module, path: str) -> Tensor:
    """The output of `model` while the module at `path` returns zeros, its weights untouched."""
    handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: _zeros(output))
    try:
        return _output(model)
    finally:
        handle.remove()


def test_skipping_is_removing_the_branch(family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(family)
    dense = _output(model)
    for site in Skip().sites(find_structure(model)):
        # BERT adds the residual inside the sublayer; elsewhere the whole sublayer is the branch
        expected = _silenced(model, str(site.output) if family == "bert" else site.name)
        undo = Skip().apply(model, site, "skip")
        assert torch.equal(_output(model), expected)
        assert not torch.equal(expected, dense)
        undo()
    assert torch.equal(_output(model), dense)


def test_skipping_everything_leaves_embeddings_and_head(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    for site in Skip().sites(find_structure(model)):
        Skip().apply(model, site, "skip")
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(TOKENS)))
    assert torch.equal(_output(model), expected)


def test_bias_of_the_output_projection_is_silenced_too(tiny_model: MakeModel) -> None:
    model = tiny_model("gpt2")
    assert model.transformer.h[0].mlp.c_proj.bias.abs().max() > 0
    site = next(site for site in find_structure(model).sites if site.kind == "ffn")
    Skip().apply(model, site, "skip")
    assert not model.transformer.h[0].mlp.c_proj.bias.any()
    assert not model.transformer.h[0].mlp.c_proj.weight.any()
    assert model.transformer.h[0].mlp.c_fc.weight.any()


def test_cost_is_weights_arithmetic_and_cache(make_structure: Callable[..., Structure]) -> None:
    attention, ffn = Skip().sites(make_structure(1, k=64))
    assert Skip().cost(attention, "skip") == {
        "linear_bytes": -2 * 4 * 64 * 64,
        "flops_per_token": -2 * 4 * 64 * 64,
        "kv_bytes_per_token": -4 * 64,
    }
    assert Skip().cost(ffn, "skip") == {"linear_bytes": -2 * 2 * 64 * 64, "flops_per_token": -2 * 2 * 64 * 64}


def test_only_skip_silences(make_structure: Callable[..., Structure]) -> None:
    site = Skip().sites(make_structure(1))[0]
    assert Skip().levels(site) == ("keep", "skip")
    assert [Skip().silences(site, level) for level in Skip().levels(site)] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zeros_have_the_dtype_of_the_model(dtype: torch.dtype, tiny_model: MakeModel) -> None:
    model = tiny_model("llama").to(dtype)
    site = Skip().sites(find_structure(model))[0]
    Skip().apply(model, site, "skip")
    assert model.get_submodule(str(site.output)).weight.dtype == dtype
