"""Adapters on linears, against the merged weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoeff.spaces.adapters import Adapter, adapter_of, adapters_at, attached, scale, with_rank
from autoeff.spaces.material import dense_weight
from autoeff.spaces.sites import Linear, find_structure

IDS = torch.randint(2, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def adapters_for(model: nn.Module, rank: int) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(1)
    linears = [linear for linear in find_structure(model).linears if not linear.experts]
    return {
        linear.name: Adapter(
            torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5,
            torch.randn(linear.out_features, rank, generator=generator) * 0.2,
        )
        for linear in linears
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(IDS)[0]
    return output


def merged(model: nn.Module, linear: Linear, adapter: Adapter, rank: int) -> None:
    weight = model.get_parameter(linear.weight)
    added = scale(rank) * adapter.b[:, :rank].double() @ adapter.a[:rank].double()
    whole = dense_weight(weight.data, linear).double() + added
    weight.data = (whole.T if linear.transposed else whole).float().contiguous()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_prefix_adds_what_the_merged_weights_would(family: str, rank: int, tiny_model: Callable[..., nn.Module]) -> None:
    model, other = tiny_model(family), tiny_model(family)
    adapters = adapters_for(model, 3)
    attached(model, adapters)
    with_rank(adapters.values(), rank)
    for linear in find_structure(other).linears:
        merged(other, linear, adapters[linear.name], rank)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-4)


def test_what_is_undone_leaves_no_trace(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    state, dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    adapters = adapters_for(model, 2)
    take_away = attached(model, adapters)
    assert model.state_dict().keys() == state.keys()
    full = logits(model)
    assert not torch.equal(full, dense)
    undo = with_rank(adapters_at(model, list(adapters)[:3]), 0)
    assert not torch.equal(logits(model), full)
    undo()
    assert torch.equal(logits(model), full)
    with_rank(adapters.values(), 0)
    assert torch.equal(logits(model), dense)
    take_away()
    assert all(adapter_of(module) is None for module in model.modules())
    assert torch.equal(logits(model), dense)
    with pytest.raises(ValueError, match="has no adapter"):
        adapters_at(model, [next(iter(adapters))])
