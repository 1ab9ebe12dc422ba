"""What every test may ask for."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]

_SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0}
_USUAL = _SMALL | {"intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}
_GROUPED = _USUAL | {"num_key_value_heads": 2}
_MIXED = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16}),
    "gemma": ("GemmaConfig", _GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 16, "final_logit_softcapping": None}),
    "gemma3_text": (
        "Gemma3TextConfig",
        _GROUPED | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "opt": ("OPTConfig", _SMALL | {"ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 1}),
    "gpt_neox": ("GPTNeoXConfig", _USUAL),
    "falcon": ("FalconConfig", _SMALL | {"ffn_hidden_size": 40, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_multi_query": ("FalconConfig", _SMALL | {"ffn_hidden_size": 40}),
    "bert": ("BertConfig", _USUAL),
    "roberta": ("RobertaConfig", _USUAL | {"pad_token_id": 1}),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", _MIXED | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", _MIXED | {"head_dim": 16}),
    "olmoe": ("OlmoeConfig", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
}
"""Every supported family, and forms of it that differ, as the name and the settings of a tiny configuration."""

_ROOMS = ("dashboard", "api", "search", "", "examples", "evaluators", "kernels", "spaces")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The upper rooms first: what starts servers and browsers takes longest, and many short tests keep all processes busy to the end."""
    folder = Path(__file__).parent
    items.sort(key=lambda item: _ROOMS.index((item.path.relative_to(folder).parts[:-1] or ("",))[0]))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def servers() -> ModuleType:
    """`benchmarks/servers.py`, which starts throw-away servers; a test that needs one fails where it cannot be had."""
    spec = importlib.util.spec_from_file_location("servers", ROOT / "benchmarks" / "servers.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["servers"] = module = importlib.util.module_from_spec(spec)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def postgres(servers: ModuleType) -> Iterator[Any]:
    """A PostgreSQL server."""
    with servers.postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def redis(servers: ModuleType) -> Iterator[Any]:
    """A Redis server."""
    with servers.redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("AUTOEFF_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("real models are not at hand; set AUTOEFF_SHARED")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: a folder that `make` fills, by one process for all processes of this test run. Nobody writes to it later."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = base / f"once-{name}", base / f"once-{name}.whole"
        with (base / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_models(once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    """Directories of random models of two or three blocks by family, each with a tokenizer of 160 ids and a context of 64.

    They are stored in float16 (llama, qwen3, bert), bfloat16 (mistral) and float32 (qwen2, gpt2); llama and gpt2 have tied heads.
    """
    folder = once("models", _make_tiny_models)
    return {path.name: path for path in sorted(folder.iterdir())}


def _make_tiny_models(folder: Path) -> None:
    import torch
    import transformers as t

    common: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    llama = common | {"intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    families: dict[str, tuple[type, Any, torch.dtype]] = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**llama, tie_word_embeddings=True), torch.float16),
        "mistral": (t.MistralForCausalLM, t.MistralConfig(**llama, sliding_window=None), torch.bfloat16),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**llama), torch.float32),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**llama, head_dim=16), torch.float16),
        "gpt2": (
            t.GPT2LMHeadModel,
            t.GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1),
            torch.float32,
        ),
        "bert": (t.BertModel, t.BertConfig(**common, intermediate_size=64), torch.float16),
    }
    for name, (model_class, config, dtype) in families.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config).to(dtype)
        model.save_pretrained(folder / name)
        _tiny_tokenizer(encoder=name == "bert").save_pretrained(folder / name)


@pytest.fixture(scope="session")
def tiny_text(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    line = "the dog sat on the mat and the cat ate the hat while all the others went there again\n"
    return once("text", lambda folder: (folder / "text.txt").write_text(line * 60)) / "text.txt"


@pytest.fixture(params=FAMILIES)
def every_family(request: pytest.FixtureRequest) -> str:
    """Each key of `FAMILIES` in turn."""
    return str(request.param)


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """`tiny_config(family, **changes)`: a configuration of 3 blocks, hidden size 32, 4 heads and 61 tokens."""

    def make(family: str, **changes: Any) -> Any:
        import transformers

        name, settings = FAMILIES[family]
        return getattr(transformers, name)(**settings | changes)

    return make


@pytest.fixture
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., nn.Module]:
    """`tiny_model(family, device="cpu", **changes)`: that model in evaluation mode with seeded random values, biases included."""

    def make(family: str, device: str = "cpu", **changes: Any) -> nn.Module:
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModel if family in ("bert", "roberta") else AutoModelForCausalLM
        with torch.device(device):
            model: nn.Module = kind.from_config(tiny_config(family, **changes)).eval()
        if device == "cpu":
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                values = torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name.lower() and name.endswith("weight"))
                parameter.data = values.half().float()  # a dense linear has 16 bits
        return model

    return make


@pytest.fixture
def stored_family(every_family: str, tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """A directory with the tiny model of each family in turn, in float16, and a tokenizer."""
    folder = tmp_path / every_family
    tiny_model(every_family, vocab_size=160).half().save_pretrained(folder)  # type: ignore[operator]
    _tiny_tokenizer(encoder=every_family in ("bert", "roberta")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random classifier of 8 x 8 images as `cat`, `dog` or `hat`, in float16, and its processor."""
    import torch
    import transformers as t

    folder = tmp_path_factory.mktemp("vit")
    config = t.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, image_size=8, patch_size=4,
        id2label=dict(enumerate(("cat", "dog", "hat"))),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.ViTForImageClassification(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.half().save_pretrained(folder)
    t.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten images of noise in each of the folders cat and dog."""
    import numpy
    from PIL import Image

    folder, noise = tmp_path_factory.mktemp("images"), numpy.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for number in range(10):
            Image.fromarray(noise.integers(0, 256, (12, 10, 3), dtype="uint8")).save(folder / label / f"{number}.png")
    return folder


def _tiny_tokenizer(*, encoder: bool) -> PreTrainedTokenizerFast:
    """Bytes and a few merges; puts `<s>` in front, encoders also `</s>` behind. The first ids are <s> </s> <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted({chr(c) for c in range(33, 127)} | set("\u0120\u010a"))  # ASCII, space and newline in ByteLevel's spelling
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the other hat, then they all went there again"] * 4, trainer)
    template = "<s> $A </s>" if encoder else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"cls_token": "<s>", "sep_token": "</s>"} if encoder else {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **names)


@pytest.fixture
def third_party_knobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes the knobs `noise` and `faulty` of `tests/plugin_package` known to this process and to those that it starts."""
    from autoeff.spaces.plugins import plugins

    folder = ROOT / "tests" / "plugin_package"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    plugins.cache_clear()
    yield folder
    plugins.cache_clear()
