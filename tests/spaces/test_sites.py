"""Sites of tiny random models of every supported family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AutoModel, AutoModelForCausalLM, MixtralConfig, T5Config
from transformers.pytorch_utils import Conv1D

from autoeff.errors import InputError
from autoeff.spaces.sites import find_structure

MakeModel = Callable[..., nn.Module]

_LLAMA_BLOCK = [
    ("self_attn", "attention", "self_attn.o_proj"),
    ("self_attn.q_proj+k_proj+v_proj", "linears", None),
    ("self_attn.o_proj", "linears", None),
    ("mlp", "ffn", "mlp.down_proj"),
    ("mlp.gate_proj+up_proj", "linears", None),
    ("mlp.down_proj", "linears", None),
]
_BLOCKS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model.layers", _LLAMA_BLOCK)),
    "gpt2": (
        "transformer.h",
        [
            ("attn", "attention", "attn.c_proj"),
            ("attn.c_attn", "linears", None),
            ("attn.c_proj", "linears", None),
            ("mlp", "ffn", "mlp.c_proj"),
            ("mlp.c_fc", "linears", None),
            ("mlp.c_proj", "linears", None),
        ],
    ),
    "bert": (
        "encoder.layer",
        [
            ("attention", "attention", "attention.output.dense"),
            ("attention.self.query+key+value", "linears", None),
            ("attention.output.dense", "linears", None),
            ("ffn", "ffn", "output.dense"),
            ("intermediate.dense", "linears", None),
            ("output.dense", "linears", None),
        ],
    ),
}


def test_sites_are_those_of_the_family(family: str, make_model: MakeModel) -> None:
    path, expected = _BLOCKS[family]
    structure = find_structure(make_model(family))
    assert structure.model_type == family
    assert structure.blocks == tuple(f"{path}.{i}" for i in range(3))
    assert [(site.name, site.kind, site.output, site.block) for site in structure.sites] == [
        (f"{path}.{i}.{name}", kind, output and f"{path}.{i}.{output}", i) for i in range(3) for name, kind, output in expected
    ]


def test_every_linear_of_a_block_is_in_one_site_and_one_sublayer(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    structure = find_structure(model)
    in_blocks = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(name.startswith(block + ".") for block in structure.blocks)
    }
    assert len(in_blocks) == len(structure.linears)
    for kinds in ({"linears"}, {"attention", "ffn"}):
        found = Counter(linear.name for site in structure.sites if site.kind in kinds for linear in site.linears)
        assert found == dict.fromkeys(in_blocks, 1)


def test_linears_carry_their_shape_and_orientation(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    for linear in find_structure(model).linears:
        module = model.get_submodule(linear.name)
        assert linear.transposed == (family == "gpt2")
        shape = (linear.in_features, linear.out_features) if linear.transposed else (linear.out_features, linear.in_features)
        assert tuple(module.weight.shape) == shape
        assert linear.bias == (module.bias is not None)
        assert linear.parameters == module.weight.numel()


def test_untied_every_linear_decides_for_itself(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    tied, untied = find_structure(model), find_structure(model, untie=True)
    singles = [site for site in untied.sites if site.kind == "linears"]
    assert [site.name for site in singles] == [linear.name for linear in tied.linears]
    assert all(len(site.linears) == 1 for site in singles)
    assert [s for s in untied.sites if s.kind != "linears"] == [s for s in tied.sites if s.kind != "linears"]


def test_meta_device_gives_the_same_structure(family: str, make_model: MakeModel) -> None:
    assert find_structure(make_model(family, "meta")) == find_structure(make_model(family))


def test_parameters_are_counted_once(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    structure = find_structure(model)
    sizes = {id(p): p.numel() for p in model.parameters()}
    assert structure.parameters == sum(sizes.values())
    embedding = model.get_input_embeddings().weight
    positions = {"gpt2": 64 * 32, "bert": (64 + 2) * 32}.get(family, 0)  # BERT: and token types
    tied = family in ("gpt2", "mistral")
    assert structure.head_parameters == (0 if family == "bert" else embedding.numel())
    assert structure.lookup_parameters == positions + (0 if tied else embedding.numel())


@pytest.mark.parametrize(("name", "expected"), [("llama", 2 * 2 * 8 * 2), ("qwen3", 2 * 2 * 16 * 2), ("gpt2", 2 * 4 * 8 * 2), ("bert", 0)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_cache_bytes_are_keys_and_values_of_a_token(name: str, expected: int, use_cache: bool, make_model: MakeModel) -> None:
    structure = find_structure(make_model(name, use_cache=use_cache))
    assert {site.kv_bytes for site in structure.sites if site.kind == "attention"} == {expected}
    assert {site.kv_bytes for site in structure.sites if site.kind != "attention"} == {0}


def test_tracing_leaves_no_hook_behind(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    find_structure(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


_TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_mixture_of_experts_is_refused_by_the_name_of_the_module() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**_TINY, num_key_value_heads=2, num_local_experts=4))
    with pytest.raises(InputError, match=r"cannot understand model\.layers\.0\.mlp\.gate\.weight"):
        find_structure(model)


def test_layers_that_share_their_weights_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AlbertConfig(**_TINY, embedding_size=16))
    with pytest.raises(InputError, match="cannot understand encoder.albert_layer_groups.0.albert_layers"):
        find_structure(model)


def test_encoder_decoder_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4))
    with pytest.raises(InputError, match="cannot understand encoder.block.0.layer"):
        find_structure(model)


class _Block(nn.Module):
    """Attention is one linear, the FFN another; `change` breaks it."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.attn = nn.ModuleDict({"left": nn.Linear(8, 8)}) if change == "listed" else nn.Linear(8, 8)
        if change == "experts":  # more of them than blocks
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.up: nn.Module = nn.Linear(8, 4 if change == "narrow" else 8)
        if change == "deep":
            self.up, self.down = (nn.Sequential(nn.Sequential(nn.Linear(8, 8))) for _ in range(2))
        if change == "uncalled":
            self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.attn["left"] if self.change == "listed" else self.attn)(x)
        for _ in range(2 if self.change == "twice" else 1):
            y = self.up(x)
        if self.change == "deep":
            y = self.down(y)
        return x if self.change == "narrow" else x + y


class _Model(nn.Module):
    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.layers = nn.ModuleList() if change == "empty" else nn.ModuleList(_Block(change) for _ in range(2))
        if change == "shared":
            self.layers[1].up.weight = self.layers[0].up.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_plain_module_with_linears_directly_in_the_block_is_understood() -> None:
    structure = find_structure(_Model())
    assert [(site.name, site.kind) for site in structure.sites if site.block == 0] == [
        ("layers.0.attention", "attention"),
        ("layers.0.attn", "linears"),
        ("layers.0.ffn", "ffn"),
        ("layers.0.up", "linears"),
    ]


def test_sublayer_is_named_by_the_path_that_its_linears_begin_with() -> None:
    structure = find_structure(_Model("deep"))  # up.0.0 and down.0.0 share their second part, not their first
    assert [site.name for site in structure.sites if site.kind == "ffn"] == ["layers.0.ffn", "layers.1.ffn"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("uncalled", r"layers\.0\.unused: a plain forward pass calls this linear 0 times"),
        ("twice", r"layers\.0\.up: a plain forward pass calls this linear 2 times"),
        ("shared", r"layers\.0\.up: its weight is shared"),
        ("narrow", r"layers\.0\.up: 4 outputs do not fit a stream of 8"),
        ("listed", r"layers\.0\.attn: a list of linears inside a block"),
        ("experts", r"layers\.0\.experts: a list of linears inside a block"),
        ("empty", r"_Model: no list of like blocks"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(InputError, match=f"cannot understand {message}"):
        find_structure(_Model(change))


def test_model_that_does_not_run_on_tokens_is_refused() -> None:
    model = _Model()
    model.forward = lambda pixels: pixels
    with pytest.raises(InputError, match="it does not run on token ids alone"):
        find_structure(model)
