"""A model's `config.json` as data: bounded, free of anything that names code, rebuilt from keys that its class declares.

transformers would follow `auto_map` to Python files and, before 5.3, `_attn_implementation_internal` to the hub. The file is
therefore never handed on: what is known is copied into a fresh configuration object, the rest is dropped.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from autoeff.errors import InputError
from autoeff.evaluators.checkpoint import read_json

__all__ = ["build_config", "quiet_transformers", "read_config", "refuse_code"]

_FILE_LIMIT = 1 << 20
_DEPTH_LIMIT = 32
_CODE_KEY = re.compile(r"auto_map|trust_remote_code|custom_pipelines|_?(attn|experts)_implementation.*")
_HARMLESS = "_attn_implementation_autoset"  # a flag that transformers 4.4x wrote into many published files
_QUANTIZED = ("quantization_config", "compression_config")
# First match wins. Large enough for every published model, small enough that building on the meta device stays a matter of seconds.
_BOUNDS = (
    (re.compile(r".*(theta|freq).*"), 1 << 53),  # a rotary base is no size
    (re.compile(r".*vocab_size.*"), 1 << 22),
    (re.compile(r"(max_position_embeddings|n_positions|n_ctx|.*max.*(seq_len|length|positions?)|seq_length|sliding_window)"), 1 << 24),
    (re.compile(r"(num_)?(hidden_)?layers|.*(num|n)_(\w+_)?layers?|.*_layers|depth"), 1_000),
    (re.compile(r"hidden_size|n_embd|d_model|embed_dim|embedding_size|dim|hidden_dim"), 131_072),
    (re.compile(r"(?!.*_token_id)(num|n)_.*"), 1 << 16),  # heads, experts, groups: each may become a module
)  # fmt: skip
_OTHER_BOUND = 1 << 31
_MODULES_BOUND = 1 << 16
_LEGACY_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # moved into `rope_parameters` by transformers 5
_UNDECLARED = {"head_dim"}  # models read it whose configuration class does not declare it, Qwen3-MoE among them
_NOT_OURS = {  # what a run decides or nothing reads
    "architectures", "dtype", "id2label", "label2id", "num_labels", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "chunk_size_feed_forward",
}  # fmt: skip


def read_config(folder: Path) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Model type, architectures and the known settings in a directory's `config.json`.

    Raises:
        InputError: The file is absent or malformed, names code, is out of bounds, or describes a model that is not supported.
    """
    path = folder / "config.json"
    raw = read_json(path, _FILE_LIMIT)
    refuse_code(raw, path)
    for key in _QUANTIZED:
        if raw.get(key) is not None:
            raise InputError(f"{path} has {key}: the checkpoint is already quantised; give the 16-bit model that it was made from")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(f"{path}: unknown model_type {str(model_type)[:80]!r}; {_suggestion(model_type)}")
    _refuse_out_of_bounds(raw, path)
    if raw.get("is_encoder_decoder") is True:
        raise InputError(f"{path}: {model_type!r} is an encoder-decoder model; decoders and encoders are supported")
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures or not all(isinstance(item, str) for item in architectures):
        raise InputError(f"{path}: architectures must list a class name such as 'LlamaForCausalLM'; found {str(architectures)[:80]}")
    config_class = CONFIG_MAPPING[model_type]
    if getattr(config_class, "sub_configs", None):
        raise InputError(f"{path}: {model_type!r} is composed of several models; give the text model alone")
    aliases = config_class.attribute_map  # in a saved file either side can stand: Qwen3-MoE writes the one that is no field
    known = {field.name for field in fields(config_class)} | set(aliases) | set(aliases.values()) | _LEGACY_ROPE | _UNDECLARED
    known -= _NOT_OURS
    if any(name.endswith("ForImageClassification") for name in architectures):
        known.add("id2label")  # as many outputs as labels
    return model_type, tuple(architectures), {key: raw[key] for key in sorted(raw.keys() & known)}


def build_config(model_type: str, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration object of settings that `read_config` let through.

    Raises:
        InputError: The class refuses them.
    """
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[model_type](**settings)
    except Exception as error:  # each of the classes validates in its own way
        raise InputError(f"config.json is no valid {model_type!r} configuration: {_one_line(error)}") from None


def refuse_code(value: object, path: Path, depth: int = 0) -> None:
    """Looks through a parsed JSON file for keys that make transformers run code.

    Raises:
        InputError: One was found, or the nesting is deeper than 32.
    """
    if depth > _DEPTH_LIMIT:
        raise InputError(f"{path} is nested deeper than {_DEPTH_LIMIT} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if _CODE_KEY.fullmatch(key) and key != _HARMLESS:
                raise InputError(
                    f"{path} has the key {key!r}, which selects code; models are data only: remove it if transformers knows the model_type"
                )
            refuse_code(item, path, depth + 1)
    elif isinstance(value, list):
        for item in value:
            refuse_code(item, path, depth + 1)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' warnings, reports and progress bars off the terminal while it works, and nothing longer."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _refuse_out_of_bounds(raw: Mapping[str, Any], path: Path) -> None:
    layers = experts = 1.0
    for key, number in _numbers(raw):
        bound = next((bound for pattern, bound in _BOUNDS if pattern.fullmatch(key[:100])), None)
        if isinstance(number, float) and bound is None:
            continue  # a coefficient
        bound = bound or _OTHER_BOUND
        if not abs(number) <= bound:
            raise InputError(f"{path}: {key[:100]!r} is {str(number)[:40]}; at most {bound} is allowed")
        if bound == 1_000:
            layers = max(layers, number)
        elif "experts" in key:
            experts = max(experts, number)
    if layers * experts > _MODULES_BOUND:
        raise InputError(f"{path}: {layers:.0f} layers of {experts:.0f} experts; at most {_MODULES_BOUND} experts in all are allowed")


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _suggestion(model_type: object) -> str:
    near = difflib.get_close_matches(str(model_type)[:80].lower(), list(CONFIG_MAPPING.keys()), n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else "expected one that the installed transformers knows, such as llama or bert"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines) or type(error).__name__)[:200]
