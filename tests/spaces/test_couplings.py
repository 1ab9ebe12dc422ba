"""Units of sublayers: what leaves together, on tiny random models of every family and on blocks made for one trait."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from autoeff.spaces.couplings import Coupling, find_couplings
from autoeff.spaces.sites import Linear, Structure, find_structure

MakeModel = Callable[..., nn.Module]

_MIXTURES = {"mixtral": (0, 1, 2), "qwen2_moe": (0, 2), "qwen3_moe": (0, 1, 2), "olmoe": (0, 1, 2)}
_WHOLE_ATTENTION = ("falcon_multi_query", "olmoe")  # one KV head for all; a norm over all heads
_AS_MANY_KV_HEADS = ("gpt2", "opt", "gpt_neox", "bert", "roberta")


def weight_of(model: nn.Module, linear: Linear) -> Tensor:
    """A view [N, K]."""
    weight = model.get_parameter(linear.weight).data
    return weight.T if linear.transposed else weight


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(14).view(2, 7))[0]
    return result


def test_units_are_kv_heads_and_neurons(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family, "meta")
    structure = find_structure(model)
    couplings = find_couplings(model, structure)
    neurons = 128 if every_family == "gpt2" else 40
    heads = 4 if every_family in _AS_MANY_KV_HEADS else 2
    mixed = _MIXTURES.get(every_family, ())
    expected, left_out = {}, {}
    for site in structure.sites:
        if site.kind == "attention" and every_family in _WHOLE_ATTENTION:
            left_out[site.name] = "every input of"
        elif site.kind == "ffn" and site.block in mixed:
            left_out[site.name] = "a mixture of experts"
        elif site.kind != "linears":
            expected[site.name] = heads if site.kind == "attention" else neurons
    assert {name: coupling.units for name, coupling in couplings.found.items()} == expected
    assert couplings.left_out.keys() == left_out.keys()
    assert all(couplings.left_out[name].startswith(reason) for name, reason in left_out.items())


def test_units_hold_every_row_and_column_once(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family, "meta")
    structure = find_structure(model)
    sites = {site.name: site for site in structure.sites}
    for name, coupling in find_couplings(model, structure).found.items():
        *producers, output = sites[name].linears
        assert list(coupling.rows) == [linear.name for linear in producers]
        assert list(coupling.columns) == [output.name]
        for places, size in [
            *((coupling.rows[linear.name], linear.out_features) for linear in producers),
            (coupling.columns[output.name], output.in_features),
        ]:
            assert places.shape == (coupling.units, size // coupling.units)
            assert torch.equal(places.flatten().sort().values, torch.arange(size))
            assert torch.equal(places, places.sort(dim=1).values)
        firsts = coupling.columns[output.name][:, 0]
        assert torch.equal(firsts, firsts.sort().values)


def test_what_is_left_does_not_depend_on_units_whose_columns_are_zero(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family).double()
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]  # the other ones know no float64
    structure = find_structure(model)
    sites = {site.name: site for site in structure.sites}
    generator = torch.Generator().manual_seed(0)
    for name, coupling in find_couplings(model, structure).found.items():
        *producers, output = sites[name].linears
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        dense = logits_of(model)
        removed = torch.randperm(coupling.units, generator=generator)[: coupling.units // 2]
        weight_of(model, output)[:, coupling.columns[output.name][removed].flatten()] = 0
        without = logits_of(model)
        assert (without - dense).abs().max() > 1e-6
        for linear in producers:
            rows = coupling.rows[linear.name][removed].flatten()
            weight_of(model, linear)[rows] = 0
            if linear.bias:
                model.get_parameter(f"{linear.name}.bias").data[rows] = 0
        torch.testing.assert_close(logits_of(model), without, rtol=0, atol=1e-9)
        for linear in producers:  # nor does it on other values than zero, which a norm or a gate could not tell from a removed row
            rows = coupling.rows[linear.name][removed].flatten()
            weight_of(model, linear)[rows] = torch.randn(len(rows), linear.in_features, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(logits_of(model), without, rtol=0, atol=1e-9)
        model.load_state_dict(state)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "phi3"])
def test_model_with_units_cut_out_gives_what_zeros_give(family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(family, attention_bias=True) if family == "llama" else tiny_model(family)
    structure = find_structure(model)
    couplings = find_couplings(model, structure).found
    head = 16 if family in ("qwen3", "gemma") else 8
    small = tiny_model(family, num_attention_heads=2, num_key_value_heads=1, head_dim=head, intermediate_size=37)
    if family == "llama":
        small = tiny_model(family, num_attention_heads=2, num_key_value_heads=1, head_dim=head, intermediate_size=37, attention_bias=True)
    generator = torch.Generator().manual_seed(1)
    cut = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for coupling in couplings.values():
        removed = torch.randperm(coupling.units, generator=generator)[: 1 if coupling.units == 2 else 3]
        for name, places in coupling.rows.items():
            kept = _kept(places, removed)
            for part in [part for part in ("weight", "bias") if f"{name}.{part}" in cut]:
                cut[f"{name}.{part}"] = cut[f"{name}.{part}"][kept]
        for name, places in coupling.columns.items():
            cut[f"{name}.weight"] = cut[f"{name}.weight"][:, _kept(places, removed)]
            model.get_parameter(f"{name}.weight").data[:, places[removed].flatten()] = 0
    small.load_state_dict(cut)
    torch.testing.assert_close(logits_of(small), logits_of(model), rtol=0, atol=2e-5)


def _kept(places: Tensor, removed: Tensor) -> Tensor:
    mask = torch.ones(places.numel(), dtype=torch.bool)
    mask[places[removed].flatten()] = False
    return mask


def test_model_stays_as_it_is_and_its_device_does_not_matter(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    structure = find_structure(model)
    before = logits_of(model)
    real, shapes_only = find_couplings(model, structure), find_couplings(tiny_model(every_family, "meta"), structure)
    assert torch.equal(logits_of(model), before)
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    assert real.left_out == shapes_only.left_out
    assert real.found.keys() == shapes_only.found.keys()
    assert all(_equal(real.found[name], shapes_only.found[name]) for name in real.found)


def _equal(a: Coupling, b: Coupling) -> bool:
    def same(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> bool:
        return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)

    return a.units == b.units and same(a.rows, b.rows) and same(a.columns, b.columns)


def test_block_with_other_heads_of_the_same_shapes_is_probed_by_itself(tiny_model: MakeModel) -> None:
    model = tiny_model("gpt2", "meta")
    attention = model.get_submodule("transformer.h.1.attn")
    attention.num_heads, attention.head_dim = 8, 4  # type: ignore[assignment]
    couplings = find_couplings(model, find_structure(model)).found
    assert [couplings[f"transformer.h.{i}.attn"].units for i in range(3)] == [4, 8, 4]


class _Block(nn.Module):
    """Attention is one linear; the FFN has `form`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.attn = nn.Linear(8, 8)
        self.up = nn.Linear(8, 6)
        self.gate = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 8)
        self.zero = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        up, gate = self.up(x.transpose(0, 1)).transpose(0, 1) if self.form == "by sequence" else self.up(x), self.gate(x)
        match self.form:
            case "interleaved":
                hidden = up * torch.relu(gate[..., 0::2]) * gate[..., 1::2]
            case "halves":
                hidden = up * gate[..., :6] * gate[..., 6:]
            case "turned":
                hidden = up * gate[..., 6:].flip(-1) * gate[..., :6].flip(-1)
            case "idle":
                hidden = up * gate[..., :6]
            case "normed":
                hidden = self.norm(up) * gate[..., :6] * gate[..., 6:]
            case "uneven":
                hidden = up * gate[..., :6] + nn.functional.pad(gate[..., 6:9], (0, 3)) + nn.functional.pad(gate[..., 9:12], (0, 3))
            case "summed":
                hidden = up + gate.sum(-1, keepdim=True)
            case "by sequence":
                hidden = up * gate[..., :6] * gate[..., 6:]
            case "valued":
                hidden = up.reshape(-1, 6 if up.unique().numel() > 1 else 5)
            case "poisoned":
                hidden = up * (self.zero / self.zero)
        return x + self.down(hidden)


class _Model(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(_Block(form) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def _ffn(form: str) -> tuple[Coupling | None, str]:
    model = _Model(form)
    structure: Structure = find_structure(model)
    couplings = find_couplings(model, structure)
    return couplings.found.get("layers.0.ffn"), couplings.left_out.get("layers.0.ffn", "")


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        ("interleaved", [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
        ("halves", [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]),
        ("turned", [[5, 11], [4, 10], [3, 9], [2, 8], [1, 7], [0, 6]]),
    ],
)
def test_rows_are_found_in_any_order_of_a_fused_linear(form: str, rows: list[list[int]]) -> None:
    coupling, _ = _ffn(form)
    assert coupling is not None
    assert coupling.rows["layers.0.gate"].tolist() == rows
    assert coupling.rows["layers.0.up"].tolist() == coupling.columns["layers.0.down"].tolist() == [[i] for i in range(6)]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("idle", "no input of layers.0.down depends on output 6 of layers.0.gate"),
        ("normed", "all inputs of layers.0.down depend on each other"),
        ("uneven", "units differ in size: they hold 1 to 3 places of layers.0.gate"),
        ("summed", "an input of layers.0.down depends on more than 8 outputs of layers.0.gate"),
        ("by sequence", "layers.0.up does not run over a batch of sequences"),
        ("valued", "_Block does not run without its weights"),
        ("poisoned", "inputs of layers.0.down are NaN although nothing is"),
    ],
)
def test_sublayer_of_another_form_is_left_out_with_the_reason(form: str, reason: str) -> None:
    coupling, why = _ffn(form)
    assert coupling is None
    assert why.startswith(reason)


def test_sublayer_of_one_linear_has_no_units() -> None:
    model = _Model("halves")
    assert find_couplings(model, find_structure(model)).left_out == dict.fromkeys(
        ("layers.0.attention", "layers.1.attention"), "it is one linear"
    )
