"""Configurations: bounded, without code, and rebuilt from known keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoeff.errors import InputError
from autoeff.evaluators.model_config import build_config, quiet_transformers, read_config, refuse_code

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
    "torch_dtype": "float16",
}


def written(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def error_of(folder: Path, config: object) -> str:
    with pytest.raises(InputError) as caught:
        build_config("llama", read_config(written(folder, config))[2])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_known_settings_are_kept_and_others_dropped(tmp_path: Path) -> None:
    model_type, architectures, config = read_config(written(tmp_path, LLAMA | {"evil": 1, "id2label": {"0": "x"}, "return_dict": False}))
    assert (model_type, architectures) == ("llama", ("LlamaForCausalLM",))
    assert config == {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type", "torch_dtype")}


def test_old_rotary_settings_reach_the_configuration(tmp_path: Path) -> None:
    config = build_config("llama", read_config(written(tmp_path, LLAMA))[2])
    assert config.rope_parameters["rope_theta"] == 50000.0


def test_other_names_of_a_setting_are_known(tmp_path: Path) -> None:
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "hidden_size": 48, "n_layer": 3}
    config = build_config("gpt2", read_config(written(tmp_path, gpt2))[2])
    assert (config.n_embd, config.num_hidden_layers) == (48, 3)


def test_setting_is_known_by_the_name_that_is_no_field(tmp_path: Path) -> None:
    mixture = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_local_experts": 6}
    assert build_config("qwen3_moe", read_config(written(tmp_path, mixture))[2]).num_experts == 6


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"trust_remote_code": True},
        {"_attn_implementation": "owner/kernel"},
        {"_attn_implementation_internal": "owner/kernel"},
        {"attn_implementation": "owner/kernel"},
        {"_experts_implementation_internal": "owner/kernel"},
        {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
        {"rope_scaling": {"deep": [{"auto_map": {}}]}},
    ],
)
def test_keys_that_select_code_are_refused_at_any_depth(tmp_path: Path, change: dict[str, Any]) -> None:
    assert "selects code" in error_of(tmp_path, LLAMA | change)


def test_flag_that_old_versions_wrote_is_harmless(tmp_path: Path) -> None:
    assert "_attn_implementation_autoset" not in read_config(written(tmp_path, LLAMA | {"_attn_implementation_autoset": True}))[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 10**9}, "'hidden_size' is 1000000000; at most 131072"),
        ({"hidden_size": 1e9}, "'hidden_size' is 1000000000.0; at most 131072"),
        ({"num_hidden_layers": 10**6}, "'num_hidden_layers' is 1000000; at most 1000"),
        ({"vocab_size": 1 << 40}, "'vocab_size' is 1099511627776; at most 4194304"),
        ({"intermediate_size": 1 << 32}, "'intermediate_size' is 4294967296; at most 2147483648"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"num_attention_heads": 10**7}, "'num_attention_heads' is 10000000; at most 65536"),
        ({"num_hidden_layers": 900, "num_experts": 900}, "900 layers of 900 experts"),
        ({"rope_scaling": {"original_max_position_embeddings": 1 << 40}}, "original_max_position_embeddings"),
        ({"hidden_size": 10**4000}, "hidden_size"),
        ({"hidden_size": float("nan")}, "'hidden_size' is nan"),
        ({"hidden_size": -(10**9)}, "hidden_size"),
        ({"a\nb": 1 << 32}, r"'a\nb' is 4294967296"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "zzzzzzzzzzzz"}, "expected one that the installed transformers knows"),
        ({"model_type": None}, "unknown model_type"),
        ({"model_type": ["llama"]}, "unknown model_type"),
        ({"model_type": "gemma3"}, "composed of several models"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_size": "many"}, "no valid 'llama' configuration"),
        ({"hidden_size": 33}, "no valid 'llama' configuration"),
        ({"num_attention_heads": 0}, "no valid 'llama' configuration"),
        ({"x": [[[]]] * 3 + [json.loads("[" * 40 + "]" * 40)]}, "nested deeper"),
    ],
)
def test_bad_configuration_is_one_clear_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    assert says in error_of(tmp_path, LLAMA | change)


def test_file_must_be_a_small_object(tmp_path: Path) -> None:
    assert "expected an object" in error_of(tmp_path, [LLAMA])
    assert "at most 1048576" in error_of(tmp_path, LLAMA | {"x": "y" * (1 << 20)})
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="missing"):
        read_config(tmp_path)


def test_code_keys_in_lists_are_found(tmp_path: Path) -> None:
    refuse_code({"a": [1, {"b": "auto_map"}]}, tmp_path)
    with pytest.raises(InputError, match="auto_map"):
        refuse_code({"a": [1, {"auto_map": 1}]}, tmp_path)


def test_transformers_is_silent_only_meanwhile() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert logging.get_verbosity() == logging.CRITICAL
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "auto_map", "factor"]), inner, max_size=3)
    ),
    max_leaves=5,
)
_KEYS = st.sampled_from(
    [*LLAMA, "rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads", "layer_types", "hidden_act", "dtype"]
) | st.text(max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(_KEYS, _VALUES, max_size=3))
def test_invented_configurations_raise_nothing_but_input_errors(tmp_path: Path, change: dict[str, Any]) -> None:
    message = ""
    try:
        model_type, _, config = read_config(written(tmp_path, LLAMA | change))
        build_config(model_type, config)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
