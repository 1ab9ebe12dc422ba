"""Sites of tiny random models of every supported family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AutoModel, AutoModelForCausalLM, Ernie4_5_MoeConfig, GptOssConfig, T5Config

from autoeff.errors import InputError
from autoeff.spaces.knob import swap
from autoeff.spaces.sites import find_structure

MakeModel = Callable[..., nn.Module]

# Sublayers and sites of a block, relative to it; sublayers with the parameters that write to the stream.
_LLAMA_ATTENTION = [
    ("self_attn", "attention", ["self_attn.o_proj.weight"]),
    ("self_attn.q_proj+k_proj+v_proj", "linears", []),
    ("self_attn.o_proj", "linears", []),
]
_LLAMA = [
    *_LLAMA_ATTENTION,
    ("mlp", "ffn", ["mlp.down_proj.weight"]),
    ("mlp.gate_proj+up_proj", "linears", []),
    ("mlp.down_proj", "linears", []),
]
_MIXTURE = [
    *_LLAMA_ATTENTION,
    ("mlp", "ffn", ["mlp.experts.down_proj"]),
    ("mlp.experts.gate_up_proj+down_proj", "linears", []),
]
_MIXTURE_WITH_SHARED = [
    *_LLAMA_ATTENTION,
    ("mlp", "ffn", ["mlp.shared_expert.down_proj.weight", "mlp.experts.down_proj"]),
    ("mlp.shared_expert.gate_proj+up_proj", "linears", []),
    ("mlp.shared_expert.down_proj", "linears", []),
    ("mlp.experts.gate_up_proj+down_proj", "linears", []),
]
_BERT = [
    ("attention", "attention", ["attention.output.dense.weight", "attention.output.dense.bias"]),
    ("attention.self.query+key+value", "linears", []),
    ("attention.output.dense", "linears", []),
    ("ffn", "ffn", ["output.dense.weight", "output.dense.bias"]),
    ("intermediate.dense", "linears", []),
    ("output.dense", "linears", []),
]


def _fused(attention: str, qkv: str, out: str, ffn: str, up: str, down: str, *parts: str) -> list[tuple[str, str, list[str]]]:
    return [
        (attention, "attention", [f"{attention}.{out}.{part}" for part in parts]),
        (f"{attention}.{qkv}", "linears", []),
        (f"{attention}.{out}", "linears", []),
        (ffn, "ffn", [f"{ffn}.{down}.{part}" for part in parts]),
        (f"{ffn}.{up}", "linears", []),
        (f"{ffn}.{down}", "linears", []),
    ]


_FALCON = _fused("self_attention", "query_key_value", "dense", "mlp", "dense_h_to_4h", "dense_4h_to_h", "weight")
_BLOCKS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), ("model.layers", [_LLAMA] * 3)),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), ("model.layers", [_MIXTURE] * 3)),
    "qwen2_moe": ("model.layers", [_MIXTURE_WITH_SHARED, _LLAMA, _MIXTURE_WITH_SHARED]),
    "phi3": ("model.layers", [_fused("self_attn", "qkv_proj", "o_proj", "mlp", "gate_up_proj", "down_proj", "weight")] * 3),
    "gpt2": ("transformer.h", [_fused("attn", "c_attn", "c_proj", "mlp", "c_fc", "c_proj", "weight", "bias")] * 3),
    "gpt_neox": (
        "gpt_neox.layers",
        [_fused("attention", "query_key_value", "dense", "mlp", "dense_h_to_4h", "dense_4h_to_h", "weight", "bias")] * 3,
    ),
    **dict.fromkeys(("falcon", "falcon_multi_query"), ("transformer.h", [_FALCON] * 3)),
    "opt": (
        "model.decoder.layers",
        [
            [
                ("self_attn", "attention", ["self_attn.out_proj.weight", "self_attn.out_proj.bias"]),
                ("self_attn.q_proj+k_proj+v_proj", "linears", []),
                ("self_attn.out_proj", "linears", []),
                ("ffn", "ffn", ["fc2.weight", "fc2.bias"]),
                ("fc1", "linears", []),
                ("fc2", "linears", []),
            ]
        ]
        * 3,
    ),
    **dict.fromkeys(("bert", "roberta"), ("encoder.layer", [_BERT] * 3)),
}
_TIED = ("gpt2", "mistral", "gemma", "gemma2", "gemma3_text", "opt", "falcon", "falcon_multi_query")
_LEARNED_POSITIONS = {"gpt2": 64, "opt": 64 + 2, "bert": 64 + 2, "roberta": 64 + 2}  # OPT: an offset; BERT, RoBERTa: token types


def test_sites_are_those_of_the_family(every_family: str, tiny_model: MakeModel) -> None:
    path, blocks = _BLOCKS[every_family]
    structure = find_structure(tiny_model(every_family))
    assert structure.model_type == every_family.removesuffix("_multi_query")
    assert structure.blocks == tuple(f"{path}.{i}" for i in range(3))
    assert [(site.name, site.kind, site.outputs, site.block) for site in structure.sites] == [
        (f"{path}.{i}.{name}", kind, tuple(f"{path}.{i}.{output}" for output in outputs), i)
        for i in range(3)
        for name, kind, outputs in blocks[i]
    ]


def test_every_weight_matrix_of_a_block_is_in_one_site_and_one_sublayer(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    structure = find_structure(model)
    in_blocks = {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and any(name.startswith(block + ".") for block in structure.blocks)
    }
    if every_family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):  # what chooses between experts is dense
        choosers = {name for name in in_blocks if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))}
        assert len(choosers) == (2 * 2 if every_family == "qwen2_moe" else 3)
        in_blocks -= choosers
    for kinds in ({"linears"}, {"attention", "ffn"}):
        found = Counter(linear.weight for site in structure.sites if site.kind in kinds for linear in site.linears)
        assert found == dict.fromkeys(in_blocks, 1)


def test_linears_carry_their_shape_and_orientation(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    for linear in find_structure(model).linears:
        weight = model.get_parameter(linear.weight)
        assert linear.transposed == (every_family == "gpt2")
        shape = (linear.in_features, linear.out_features) if linear.transposed else (linear.out_features, linear.in_features)
        assert tuple(weight.shape) == ((linear.experts, *shape) if linear.experts else shape)
        assert linear.parameters == linear.rows * linear.in_features == weight.numel()
        if not linear.experts:
            assert linear.bias == (model.get_submodule(linear.name).bias is not None)
            assert linear.parameters_per_token == linear.parameters


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_token_meets_the_experts_that_it_is_sent_to(family: str, tiny_model: MakeModel) -> None:
    experts = [linear for linear in find_structure(tiny_model(family)).linears if linear.experts]
    assert len(experts) == (2 * 2 if family == "qwen2_moe" else 2 * 3)
    assert {(linear.experts, linear.experts_per_token) for linear in experts} == {(4, 2)}
    assert all(2 * linear.parameters_per_token == linear.parameters for linear in experts)


def test_zeros_in_the_outputs_silence_the_sublayer(every_family: str, tiny_model: MakeModel) -> None:
    """The branch of a sublayer is what its module, or its last linear, gives."""
    model = tiny_model(every_family)
    ids = torch.arange(12).view(2, 6)
    for site in [site for site in find_structure(model).sites if site.outputs]:
        silent: list[bool] = []
        branch = model.get_submodule(site.output) if every_family in ("bert", "roberta", "opt") else model.get_submodule(site.name)

        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...], silent: list[bool] = silent) -> None:
            silent.append(not (output[0] if isinstance(output, tuple) else output).any())

        handle = branch.register_forward_hook(hook)
        with torch.no_grad():
            model(input_ids=ids)
            undo = swap(model, {name: torch.zeros_like(model.get_parameter(name)) for name in site.outputs})
            model(input_ids=ids)
        undo()
        handle.remove()
        assert silent == [False, True]


def test_swapping_in_the_same_values_changes_nothing(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids)[0]
        names = [linear.weight for linear in find_structure(model).linears]
        undo = swap(model, {name: model.get_parameter(name).detach().clone() for name in names})
        assert torch.equal(model(input_ids=ids)[0], expected)
        undo()
        assert torch.equal(model(input_ids=ids)[0], expected)


def test_untied_every_linear_decides_for_itself(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    tied, untied = find_structure(model), find_structure(model, untie=True)
    singles = [site for site in untied.sites if site.kind == "linears"]
    assert [site.name for site in singles] == [linear.name for linear in tied.linears]
    assert all(len(site.linears) == 1 for site in singles)
    assert [s for s in untied.sites if s.kind != "linears"] == [s for s in tied.sites if s.kind != "linears"]


def test_meta_device_gives_the_same_structure(every_family: str, tiny_model: MakeModel) -> None:
    assert find_structure(tiny_model(every_family, "meta")) == find_structure(tiny_model(every_family))


def test_parameters_are_counted_once(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    structure = find_structure(model)
    sizes = {id(p): p.numel() for p in model.parameters()}
    assert structure.parameters == sum(sizes.values())
    embedding = model.get_input_embeddings().weight
    head = every_family not in ("bert", "roberta")
    assert structure.head_parameters == (embedding.numel() if head else 0)
    positions = 32 * _LEARNED_POSITIONS.get(every_family, 0)
    assert structure.lookup_parameters == positions + (0 if every_family in _TIED else embedding.numel())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", 2 * 2 * 8 * 2),
        ("qwen3", 2 * 2 * 16 * 2),
        ("gpt2", 2 * 4 * 8 * 2),
        ("bert", 0),
        ("phi3", 2 * 2 * 8 * 2),
        ("gpt_neox", 2 * 4 * 8 * 2),
        ("falcon_multi_query", 2 * 1 * 8 * 2),
        ("mixtral", 2 * 2 * 8 * 2),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_cache_bytes_are_keys_and_values_of_a_token(name: str, expected: int, use_cache: bool, tiny_model: MakeModel) -> None:
    structure = find_structure(tiny_model(name, use_cache=use_cache))
    assert {site.kv_bytes for site in structure.sites if site.kind == "attention"} == {expected}
    assert {site.kv_bytes for site in structure.sites if site.kind != "attention"} == {0}


@pytest.mark.parametrize("padding", [0, 5, None])
def test_padding_id_does_not_matter_and_stays(padding: int | None, tiny_model: MakeModel) -> None:
    model = tiny_model("gpt2", "meta", pad_token_id=padding)
    assert find_structure(model) == find_structure(tiny_model("gpt2"))
    assert model.config.pad_token_id == padding  # type: ignore[union-attr]


def test_tracing_leaves_nothing_behind(every_family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(every_family)
    find_structure(model)
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


_TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_router_may_hold_its_linear_and_more() -> None:
    config = Ernie4_5_MoeConfig(**_TINY, num_key_value_heads=2, moe_num_experts=4, moe_k=2, moe_intermediate_size=24)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ffn = next(site for site in find_structure(model).sites if site.name == "model.layers.1.mlp")
    assert {linear.name.split(".")[4] for linear in ffn.linears} == {"experts", "shared_experts"}


def test_experts_of_another_form_are_refused_by_name() -> None:
    with torch.device("meta"):  # [E, K, N] with biases
        model = AutoModelForCausalLM.from_config(GptOssConfig(**_TINY, num_key_value_heads=2, head_dim=8, num_local_experts=4))
    with pytest.raises(InputError, match=r"cannot understand model\.layers\.0\.mlp\.experts: gate_up_proj \(4, 32, 80\), "):
        find_structure(model)


def test_logits_that_are_not_what_the_head_gives_are_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(InputError, match="cannot understand Gemma2ForCausalLM: it changes the logits that its head gives"):
        find_structure(tiny_model("gemma2", "meta", final_logit_softcapping=30.0))


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
    with pytest.raises(InputError, match="it does not run on input_ids alone"):
        find_structure(model)
