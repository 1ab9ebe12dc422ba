"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("AUTOEFF_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("real models are not at hand; set AUTOEFF_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of random models of two or three blocks by family, each with a tokenizer of 160 ids and a context of 64.

    They are stored in float16 (llama, qwen3, bert), bfloat16 (mistral) and float32 (qwen2, gpt2); llama and gpt2 have tied heads.
    """
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
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for name, (model_class, config, dtype) in families.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config).to(dtype)
        model.save_pretrained(folder / name)
        _tiny_tokenizer(encoder=name == "bert").save_pretrained(folder / name)
        paths[name] = folder / name
    return paths


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
