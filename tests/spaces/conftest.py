"""Tiny random models of every supported family, and a structure made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from autoeff.spaces.sites import Linear, Site, Structure

_COMMON = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
_DECODER = _COMMON | {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_DECODER),
    "mistral": lambda: MistralConfig(**_DECODER, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_DECODER),
    "qwen3": lambda: Qwen3Config(**_DECODER, head_dim=16),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "bert": lambda: BertConfig(**_COMMON, max_position_embeddings=64),
}


@pytest.fixture(params=_CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    """The `model_type` of each supported family in turn."""
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """`make_model(family, device="cpu", **changes)`: a model with seeded random weights, biases included, in evaluation mode."""

    def make(family: str, device: str = "cpu", **changes: object) -> nn.Module:
        config = _CONFIGS[family]()
        for name, value in changes.items():
            setattr(config, name, value)
        kind = AutoModel if family == "bert" else AutoModelForCausalLM
        with torch.device(device):
            model = kind.from_config(config).eval()
        if device == "cpu":
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                values = torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name.lower() and name.endswith("weight"))
                parameter.data = values.half().float()  # a dense linear has 16 bits
        return model

    return make


@pytest.fixture
def make_structure() -> Callable[..., Structure]:
    """`make_structure(blocks, k=64)`: blocks of attention (q+k+v, o) and FFN (up, down) with linears [k, k]."""

    def make(blocks: int, k: int = 64) -> Structure:
        sites: list[Site] = []
        for i in range(blocks):
            for kind, groups in (("attn", (("q", "k", "v"), ("o",))), ("mlp", (("up",), ("down",)))):
                path = f"blocks.{i}.{kind}"
                linears = {name: Linear(f"{path}.{name}", k, k, bias=False) for group in groups for name in group}
                sublayer = tuple(linears.values())
                whole = "attention" if kind == "attn" else "ffn"
                sites.append(Site(path, whole, i, sublayer, sublayer[-1].name, kv_bytes=4 * k if whole == "attention" else 0))
                for group in groups:
                    sites.append(Site(f"{path}.{'+'.join(group)}", "linears", i, tuple(linears[name] for name in group)))
        searchable = blocks * 6 * k * k
        return Structure("made_by_hand", tuple(f"blocks.{i}" for i in range(blocks)), tuple(sites), searchable + 1000, 400, 300)

    return make
