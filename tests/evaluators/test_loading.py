"""Models as data: found, checked against their configuration before allocation, loaded without code or network."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.evaluators.loading import (
    check_memory,
    compute_dtype,
    inspect_model,
    load_model,
    load_tokenizer,
    memory_needed,
    resolve_model,
    skeleton,
)
from autoeff.spaces.sites import find_structure

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "bert"]


@pytest.fixture
def altered(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies a tiny model with changed tensors or settings."""

    def alter(name: str, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **settings: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_models[name], folder)
        if tensors is not None:
            save_file(
                {k: t.contiguous() for k, t in tensors(load_file(folder / "model.safetensors")).items()}, folder / "model.safetensors"
            )
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return alter


def outputs(model: nn.Module) -> Tensor:
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        result: Tensor = model(input_ids=ids)[0]
    return result


def reference(folder: Path) -> nn.Module:
    """The model as transformers alone loads it, rounded to the 16-bit store."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if folder.name == "bert" else AutoModelForCausalLM
    store = torch.bfloat16 if folder.name == "mistral" else torch.float16
    model: nn.Module = auto.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(store).float()
    return model


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        inspect_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_loads_the_stored_values(tiny_models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(reference(tiny_models[name]))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    facts = inspect_model(tiny_models[name])
    model = load_model(facts, CPU)
    load_tokenizer(facts)
    assert torch.equal(outputs(model), expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_are_those_of_the_loaded_model(tiny_models: dict[str, Path], name: str) -> None:
    facts = inspect_model(tiny_models[name])
    model = load_model(facts, CPU)
    assert facts.model_type == name
    assert facts.task == ("encoder" if name == "bert" else "decoder")
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.stored_bytes == sum(t.nbytes for t in load_file(tiny_models[name] / "model.safetensors").values())
    assert (facts.context, facts.vocabulary) == (64, 160)
    assert find_structure(skeleton(facts)) == find_structure(model)
    assert all(p.is_meta for p in skeleton(facts).parameters())


@pytest.fixture
def saved(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Path]:
    """`saved(family)`: the directory of the tiny model as `save_pretrained` writes it, in float32."""

    def save(family: str) -> Path:
        tiny_model(family).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def test_saved_model_of_every_family_loads(
    every_family: str, saved: Callable[..., Path], tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(every_family)
    expected = outputs(tiny_model(every_family))  # its values have 16 bits
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    facts = inspect_model(folder)
    model = load_model(facts, CPU)
    assert torch.equal(outputs(model), expected)
    assert facts.task == ("encoder" if every_family in ("bert", "roberta") else "decoder")
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.stored_bytes == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert find_structure(skeleton(facts)) == find_structure(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_are_stored_one_by_one_or_stacked(family: str, saved: Callable[..., Path], tiny_model: Callable[..., nn.Module]) -> None:
    folder = saved(family)
    one_by_one = inspect_model(folder)
    assert any(".experts.3." in name for name in one_by_one.tensors)
    model = tiny_model(family)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    stacked = inspect_model(folder)
    assert stacked.parameters == one_by_one.parameters
    assert stacked.stored_bytes == one_by_one.stored_bytes
    assert torch.equal(outputs(load_model(stacked, CPU)), outputs(model))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: without("model.layers.2.mlp.experts.3.up_proj.weight")(t), "lack 'model.layers.2.mlp.experts.3.up_proj.weight'"),
        (lambda t: t | {"model.layers.2.mlp.experts.4.up_proj.weight": torch.zeros(40, 32)}, "hold 'model.layers.2.mlp.experts.4.up_proj."),
        (lambda t: t | {"model.layers.2.mlp.experts.3.up_proj.weight": torch.zeros(41, 32)}, "has the shape (41, 32)"),
        (lambda t: t | {"model.layers.2.mlp.experts.3.up_proj.weight": torch.zeros(40, 32, dtype=torch.int8)}, "is stored as I8"),
    ],
)
def test_experts_that_do_not_fit_the_configuration_are_refused(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    folder = saved("olmoe")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    assert says in error_of(folder)


def test_context_of_roberta_leaves_out_the_positions_behind_its_padding_id(saved: Callable[..., Path]) -> None:
    facts = inspect_model(saved("roberta"))
    assert facts.context == 64 - 2
    model = load_model(facts, CPU)
    with torch.no_grad():
        assert model(input_ids=torch.full((1, 62), 5))[0].shape == (1, 62, 32)
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(input_ids=torch.full((1, 63), 5))


def test_store_dtype_is_the_files_or_the_narrowest_that_holds_the_values(tiny_models: dict[str, Path]) -> None:
    facts = {name: inspect_model(path) for name, path in tiny_models.items()}
    assert {name: f.store_dtype for name, f in facts.items()} == dict.fromkeys(FAMILIES, torch.float16) | {"mistral": torch.bfloat16}
    assert {name: f.dtype for name, f in facts.items() if f.dtype != torch.float16} == {
        "mistral": torch.bfloat16, "qwen2": torch.float32, "gpt2": torch.float32,
    }  # fmt: skip
    assert {name for name, f in facts.items() if f.notices} == {"qwen2", "gpt2"}
    assert "float32 weights are rounded to float16" in facts["gpt2"].notices[0]
    assert compute_dtype(facts["mistral"], CPU) == torch.float32
    assert compute_dtype(facts["mistral"], torch.device("cuda")) == torch.bfloat16


def test_values_beyond_float16_are_stored_as_bfloat16(altered: Callable[..., Path]) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70_000.0
        return tensors

    facts = inspect_model(altered("qwen2", enlarge))
    assert facts.store_dtype == torch.bfloat16
    assert load_model(facts, CPU).get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] == 70_144.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_float32_values_are_refused(altered: Callable[..., Path], value: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.norm.weight"][3] = value
        return tensors

    assert "'model.norm.weight' holds values that are not finite" in error_of(altered("qwen2", damage))


def test_checkpoint_of_the_base_model_without_prefix_loads(altered: Callable[..., Path], tiny_models: dict[str, Path]) -> None:
    """The form of the first GPT-2 files: no `transformer.`, and the causal mask stored beside the weights."""

    def strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks

    facts = inspect_model(altered("gpt2", strip))
    assert "h.0.attn.bias" not in facts.tensors
    assert torch.equal(outputs(load_model(facts, CPU)), outputs(load_model(inspect_model(tiny_models["gpt2"]), CPU)))


def test_encoder_with_prefix_head_and_old_layer_norm_names_loads(altered: Callable[..., Path], tiny_models: dict[str, Path]) -> None:
    def as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
        extra = {"cls.predictions.bias": torch.zeros(160), "bert.embeddings.position_ids": torch.arange(64)[None]}
        return {f"bert.{name}": tensor for name, tensor in old.items()} | extra

    facts = inspect_model(altered("bert", as_published, architectures=["BertForMaskedLM"]))
    assert facts.task == "encoder"
    assert facts.notices == ("1 tensors of a task head are left out, cls.predictions.bias among them",)
    assert torch.equal(outputs(load_model(facts, CPU)), outputs(load_model(inspect_model(tiny_models["bert"]), CPU)))


def test_encoder_without_pooler_has_none(altered: Callable[..., Path], tiny_models: dict[str, Path]) -> None:
    facts = inspect_model(altered("bert", lambda tensors: {n: t for n, t in tensors.items() if "pooler" not in n}))
    model = load_model(facts, CPU)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    assert torch.equal(outputs(model), outputs(load_model(inspect_model(tiny_models["bert"]), CPU)))


def test_shards_load_as_one_file(altered: Callable[..., Path], tiny_models: dict[str, Path]) -> None:
    folder = altered("llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(outputs(load_model(inspect_model(folder), CPU)), outputs(load_model(inspect_model(tiny_models["llama"]), CPU)))


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("name", "tensors", "settings", "says"),
    [
        ("llama", without("model.layers.2.mlp.up_proj.weight"), {}, "lack 'model.layers.2.mlp.up_proj.weight'"),
        ("llama", None, {"tie_word_embeddings": False}, "lack 'lm_head.weight'"),
        ("llama", lambda t: t | {"model.extra.weight": torch.zeros(2)}, {}, "'model.extra.weight', which a LlamaForCausalLM"),
        ("llama", None, {"num_hidden_layers": 2}, "'model.layers.2."),
        ("llama", None, {"vocab_size": 161}, "has the shape (160, 32) in model.safetensors, config.json asks for (161, 32)"),
        ("llama", None, {"hidden_size": 131_072, "vocab_size": 1 << 22}, "has the shape"),
        ("llama", None, {"hidden_size": 10**9}, "at most 131072"),
        ("llama", None, {"hidden_act": "nonsense"}, "no model that transformers can build"),
        ("llama", None, {"auto_map": {"AutoModel": "evil.Model"}}, "selects code"),
        ("llama", None, {"model_type": "clip_vision_model"}, "has no LlamaForCausalLM for model_type"),
        ("llama", None, {"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"]}, "reads neither text nor images"),
        (
            "mistral",
            None,
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
            "'model.layers.0.mlp.down_proj.weight', which a MixtralForCausalLM",
        ),
        ("qwen3", lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.int8)}, {}, "is stored as I8"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    altered: Callable[..., Path], name: str, tensors: Any, settings: dict[str, Any], says: str
) -> None:
    assert says in error_of(altered(name, tensors, **settings))


def test_pickle_truncated_and_foreign_weights_are_refused(altered: Callable[..., Path]) -> None:
    folder = altered("llama")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "truncated" in error_of(folder)
    weights.write_bytes(b"\x80\x04\x95" + bytes(6) + b"\x8c\x05posix\x8c\x06system")
    assert "pickle" in error_of(folder)
    weights.rename(folder / "pytorch_model.bin")
    assert "convert" in error_of(folder)


def test_tokenizer_that_names_code_is_refused(altered: Callable[..., Path]) -> None:
    folder = altered("llama")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    assert "tokenizer_config.json has the key 'auto_map'" in error_of(folder)


def test_missing_or_broken_tokenizer_is_one_clear_line(altered: Callable[..., Path]) -> None:
    folder = altered("llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(inspect_model(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(inspect_model(folder))


def test_digest_follows_weights_config_and_tokenizer_alone(altered: Callable[..., Path], tiny_models: dict[str, Path]) -> None:
    digest = inspect_model(tiny_models["qwen3"]).digest
    folder = altered("qwen3")
    shutil.copy(tiny_models["qwen3"] / "config.json", folder)
    (folder / "README.md").write_text("a card")
    assert inspect_model(folder).digest == digest
    (folder / "special_tokens_map.json").write_text("{}")
    with_tokenizer = inspect_model(folder).digest
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with_weights = inspect_model(folder).digest
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert len({digest, with_tokenizer, with_weights, inspect_model(folder).digest}) == 4


def test_files_changed_after_inspection_are_reported(altered: Callable[..., Path]) -> None:
    folder = altered("llama")
    facts = inspect_model(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot load"):
        load_model(facts, CPU)


def test_memory_is_counted_in_weights_and_refused_when_absent(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = inspect_model(tiny_models["qwen2"])
    assert memory_needed(facts, CPU) == 6 * facts.parameters
    assert memory_needed(facts, torch.device("cuda")) == 2 * facts.parameters
    check_memory(facts, CPU)
    monkeypatch.setattr("os.sysconf", lambda _: 200)
    with pytest.raises(InputError, match="needs 0.0 GB on cpu"):
        load_model(facts, CPU)


def test_directories_and_bundled_names_are_found(tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tiny_models["llama"])) == tiny_models["llama"].resolve()
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    assert resolve_model("tiny") == tmp_path / "models" / "tiny"
    with pytest.raises(InputError, match=r"a bundled model \(tiny\)"):
        resolve_model("tinny")


@pytest.mark.parametrize("reference", ["", "nothing-of-that-name", "/no/such/folder", "./a/b", "a/b/c", "..", "x\0y"])
def test_name_of_nothing_says_what_is_expected(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if reference == "..":
        reference = "../.."  # exists, as a directory without a model
        assert "config.json is missing" in error_of(resolve_model(reference))
        return
    with pytest.raises(InputError, match="does not exist; expected a directory"):
        resolve_model(reference)


def test_file_and_empty_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file; expected the directory"):
        resolve_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in error_of(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "task", "parameters"),
    [("stories260K", "decoder", 260_032), ("babyllama-105", "decoder", 936_448), ("minilm-l6", "encoder", 22_713_216)],
)
def test_real_models_are_understood(shared: Path, name: str, task: str, parameters: int) -> None:
    facts = inspect_model(shared / "models" / name)
    assert (facts.task, facts.parameters, facts.store_dtype, facts.notices) == (task, parameters, torch.float16, ())
    assert load_tokenizer(facts)("hello", add_special_tokens=False)["input_ids"]
