"""Safetensors headers: what is well-formed is read, and nothing else gets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from autoeff.errors import InputError
from autoeff.evaluators.checkpoint import StoredTensor, existing_path, read_checkpoint, read_header, read_json

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
}


def written(path: Path, header: object, data: int = 16, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data))
    return path


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header_or_error(path: Path) -> dict[str, StoredTensor] | str:
    try:
        return read_header(path)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_header_of_the_library_is_read(path: Path) -> None:
    save_file({"x": np.zeros((3, 5), np.float16), "y": np.zeros(7, np.int64), "empty": np.zeros((0, 4), np.float32)}, path)
    assert read_header(path) == {
        "x": StoredTensor("model.safetensors", "F16", (3, 5), 30),
        "y": StoredTensor("model.safetensors", "I64", (7,), 56),
        "empty": StoredTensor("model.safetensors", "F32", (0, 4), 0),
    }


def test_hand_written_header_is_read(path: Path) -> None:
    tensors = read_header(written(path, GOOD))
    assert [tensors[name].elements for name in ("a", "b")] == [6, 1]


def test_truncated_file_names_found_and_expected_bytes(path: Path) -> None:
    save_file({"x": np.zeros((30, 50), np.float16)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    message = error_of(path)
    assert "truncated" in message
    assert str(len(whole)) in message
    assert str(len(whole) - 100) in message


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_file_cut_inside_the_header_is_truncated(path: Path, kept: int) -> None:
    path.write_bytes(written(path, GOOD).read_bytes()[:kept])
    assert "truncated" in error_of(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix", "pickle"),
        (b"PK\x03\x04" + bytes(60), "pickle"),
        (b"GGUF" + bytes(60), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "claims"),
        ((2).to_bytes(8, "little") + b"[]", "does not start"),
    ],
)
def test_other_formats_are_named(path: Path, content: bytes, says: str) -> None:
    path.write_bytes(content)
    assert says in error_of(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 10]}}, "needs 12 bytes"),
        ({"b": {"dtype": "F32", "shape": [], "data_offsets": [10, 14]}}, "no gaps, no overlaps"),
        ({"b": {"dtype": "F32", "shape": [], "data_offsets": [13, 17]}}, "no gaps, no overlaps"),
        ({"b": {"dtype": "F31", "shape": [], "data_offsets": [12, 16]}}, "dtype 'F31'"),
        ({"b": {"dtype": ["F32"], "shape": [], "data_offsets": [12, 16]}}, "dtype"),
        ({"b": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [12, 16]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [True], "data_offsets": [12, 16]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [1.0], "data_offsets": [12, 16]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [12, 16]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [12, 16]}}, "shape"),
        ({"b": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [12, 16]}}, "needs"),
        ({"b": {"dtype": "F32", "shape": [], "data_offsets": [16, 12]}}, "needs"),
        ({"b": {"dtype": "F32", "shape": [], "data_offsets": [12]}}, "data_offsets"),
        ({"b": {"dtype": "F32", "shape": []}}, "data_offsets"),
        ({"b": 7}, "no object"),
        ({"c": {"dtype": "U8", "shape": [1], "data_offsets": [16, 17]}}, "truncated"),
    ],
)
def test_header_that_breaks_a_rule_is_refused(path: Path, change: dict[str, Any], says: str) -> None:
    assert says in error_of(written(path, GOOD | change))


def test_bytes_after_the_last_tensor_are_refused(path: Path) -> None:
    assert "3 bytes after its last tensor" in error_of(written(path, GOOD, data=19))


def test_header_size_and_number_of_tensors_are_capped(path: Path) -> None:
    assert "claims 4194305 bytes" in error_of(written(path, GOOD, length=(4 << 20) + 1))
    many = {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}
    assert "20001 tensors" in error_of(written(path, many, data=0))


@pytest.mark.parametrize("raw", [b'{"a": 1, "a": 2}', b'{"a":' + b"[" * 100_000, b'{"a": \xff}', b'{"a": ' + b"9" * 5000 + b"}"])
def test_header_that_is_no_sound_json_is_refused(path: Path, raw: bytes) -> None:
    assert "not valid JSON" in error_of(written(path, raw))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_corrupted_files_raise_nothing_but_input_errors(path: Path, data: st.DataObject) -> None:
    content = bytearray(save({"x": np.zeros((3, 5), np.float16), "layers.0.y": np.zeros(7, np.float32)}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at:]
                content += b"\0"
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    tensors = header_or_error(path)
    if not isinstance(tensors, str):  # what passes is sound: the data of all tensors together is what follows the header
        assert sum(tensor.bytes for tensor in tensors.values()) == len(content) - 8 - int.from_bytes(content[:8], "little")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=6), _JSON, max_size=4))
def test_invented_headers_raise_nothing_but_input_errors(path: Path, header: dict[str, Any]) -> None:
    header_or_error(written(path, header))


def sharded(folder: Path) -> dict[str, str]:
    save_file({"a": np.zeros(3, np.float16)}, folder / "model-1.safetensors")
    save_file({"b": np.zeros(5, np.float16), "c": np.zeros(2, np.float32)}, folder / "model-2.safetensors")
    return {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    index(tmp_path, sharded(tmp_path))
    checkpoint = read_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == sharded(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "weights.bin", "a\0.safetensors"]
)
def test_shard_outside_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    index(tmp_path, sharded(tmp_path) | {"a": name})
    with pytest.raises(InputError, match="expected a plain"):
        read_checkpoint(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    index(tmp_path, sharded(tmp_path))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"'model-2.safetensors', which is missing"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [{"b": "model-1.safetensors"}, {"d": "model-1.safetensors"}, {"c": None}])
def test_index_that_disagrees_with_a_shard_is_refused(tmp_path: Path, change: dict[str, str | None]) -> None:
    index(tmp_path, {name: file for name, file in (sharded(tmp_path) | change).items() if file})
    with pytest.raises(InputError, match="disagree"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}])
def test_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    index(tmp_path, weight_map)
    with pytest.raises(InputError, match="weight_map"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("model.pt", "can run code"),
        ("x.ckpt", "can run code"),
        ("x.pth", "can run code"),
        ("q.gguf", "GGUF"),
    ],
)
def test_weights_of_other_formats_say_how_to_convert(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=says):
        read_checkpoint(tmp_path)


def test_directory_without_weights_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected model\.safetensors"):
        read_checkpoint(tmp_path)


def test_weights_that_are_a_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="no regular file"):
        read_checkpoint(tmp_path)


def test_json_files_are_capped_and_must_be_objects(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(InputError, match="missing"):
        read_json(file, 10)
    file.write_text('{"a": [1, 2, 3]}')
    assert read_json(file, 100) == {"a": [1, 2, 3]}
    with pytest.raises(InputError, match="16 bytes; at most 10"):
        read_json(file, 10)
    file.write_text("[1]")
    with pytest.raises(InputError, match="expected an object"):
        read_json(file, 10)


@pytest.mark.parametrize("reference", ["", "a" * 5000, "~nobody-of-that-name/x", "a\0b", "no/such/thing"])
def test_names_that_no_file_has_are_none(reference: str) -> None:
    assert existing_path(reference) is None
