"""The stored tensors of a model directory, known from the safetensors headers alone, before any library opens a file.

A safetensors file is an unsigned 64-bit little-endian length, a JSON header of that many bytes (`name -> dtype, shape,
data_offsets`) and the data. Everything a hostile file could lie about is checked here, so that what follows can trust it.
Format: https://huggingface.co/docs/safetensors (header cap and contiguity as there; the cap is lowered to 4 MiB).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from autoeff.errors import InputError

__all__ = ["DTYPE_BYTES", "Checkpoint", "StoredTensor", "existing_path", "read_checkpoint", "read_header", "read_json"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_HEADER_LIMIT = 4 << 20
_TENSOR_LIMIT = 20_000
_RANK_LIMIT = 8
_LENGTH_BYTES = 8
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        file: Name of the file that holds it.
        dtype: As safetensors writes it, a key of `DTYPE_BYTES`.
        shape: Sizes.
        bytes: Size of the data.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model directory.

    Attributes:
        files: Weight files, sorted by name.
        tensors: Every tensor by its name.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]


def existing_path(reference: str) -> Path | None:
    """The file or directory that a user named, or None; also for names that no file can have."""
    try:
        path = Path(reference).expanduser()
        return path if reference and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a NUL byte
        return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """What `model.safetensors`, or the shards that `model.safetensors.index.json` lists, hold.

    Raises:
        InputError: No weights, weights of another format, or a file that breaks a rule of the format.
    """
    if (folder / WEIGHTS).exists():
        path = folder / WEIGHTS
        return Checkpoint((path,), read_header(path))
    if (folder / INDEX).exists():
        return _read_shards(folder)
    foreign = sorted(p.name for p in folder.iterdir() if p.suffix in _FOREIGN)
    if foreign and foreign[0].endswith(".gguf"):
        raise InputError(f"{folder} holds {foreign[0]} and no {WEIGHTS}; give the 16-bit safetensors that the GGUF was made from")
    if foreign:
        raise InputError(
            f"{folder} holds {foreign[0]} and no {WEIGHTS}; pickled weights can run code and are not read: if you trust them, convert them "
            f"once with AutoModel.from_pretrained(DIR).save_pretrained(NEW) of transformers (AutoModelForCausalLM for decoders)"
        )
    raise InputError(f"{folder} holds no weights; expected {WEIGHTS}, or {INDEX} and its shards")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
        InputError: The file is truncated, is no safetensors file, or its header breaks a rule.
    """
    if not path.is_file():
        raise InputError(f"{path} is no regular file; expected safetensors weights")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES + 1)
            length = int.from_bytes(start[:_LENGTH_BYTES], "little")
            if len(start) <= _LENGTH_BYTES:
                raise InputError(f"{path} is truncated: {size} bytes found, more than {_LENGTH_BYTES} expected; copy or download it again")
            if length > _HEADER_LIMIT or not start.endswith(b"{"):
                raise InputError(f"{path} is no safetensors file: {_what_it_is(start, length)}")
            if _LENGTH_BYTES + length > size:
                raise InputError(
                    f"{path} is truncated: {size} bytes found, at least {_LENGTH_BYTES + length} expected; copy or download it again"
                )
            header = _parse(start[_LENGTH_BYTES:] + file.read(length - 1), f"the header of {path}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    header.pop("__metadata__", None)
    if len(header) > _TENSOR_LIMIT:
        raise InputError(f"{path} lists {len(header)} tensors; at most {_TENSOR_LIMIT} are allowed")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    end = 0
    for start_byte, end_byte, name, _ in spans:
        if start_byte != end:
            raise InputError(f"{path}: the data of {name!r} starts at byte {start_byte}, expected {end} (no gaps, no overlaps)")
        end = end_byte
    expected = _LENGTH_BYTES + length + end
    if size < expected:
        raise InputError(f"{path} is truncated: {size} bytes found, {expected} expected; copy or download it again")
    if size > expected:
        raise InputError(f"{path} has {size - expected} bytes after its last tensor: {size} bytes found, {expected} expected")
    return {name: tensor for _, _, name, tensor in spans}


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit_bytes`.

    Raises:
        InputError: The file is absent, too large, or holds no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; expected a JSON file")
    try:
        if (size := path.stat().st_size) > limit_bytes:
            raise InputError(f"{path} has {size} bytes; at most {limit_bytes} are allowed")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return _parse(data, str(path))


def _read_shards(folder: Path) -> Checkpoint:
    where = folder / INDEX
    listed = read_json(where, _HEADER_LIMIT).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{where} has no weight_map from tensor names to file names")
    if len(listed) > _TENSOR_LIMIT:
        raise InputError(f"{where} lists {len(listed)} tensors; at most {_TENSOR_LIMIT} are allowed")
    names = sorted(set(listed.values()))
    for name in names:
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise InputError(f"{where} names the shard {name!r}; expected a plain *.safetensors file name of the same directory")
        if not (folder / name).is_file():
            raise InputError(f"{where} names the shard {name!r}, which is missing; copy or download it again")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        header = read_header(folder / name)
        expected = {tensor for tensor, file in listed.items() if file == name}
        if odd := sorted(expected ^ header.keys()):
            raise InputError(f"{where} and {name} disagree on the tensor {odd[0]!r}; copy or download both again")
        tensors |= header
    return Checkpoint(tuple(folder / name for name in names), tensors)


def _what_it_is(start: bytes, length: int) -> str:
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and 2 <= start[1] <= 5):
        return "it holds a Python pickle, which can run code; convert it with transformers' save_pretrained if you trust it"
    if start.startswith(b"version "):
        return "it is a Git LFS pointer; fetch the file itself (git lfs pull)"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file; give the 16-bit model that it was made from"
    if length > _HEADER_LIMIT:
        return f"its header claims {length} bytes, at most {_HEADER_LIMIT} are allowed"
    return "its header does not start with '{'"


def _span(path: Path, name: str, entry: object) -> tuple[int, int, str, StoredTensor]:
    """First and last byte of a tensor's data and what it is."""
    if not isinstance(entry, dict):
        raise InputError(f"{path}: the header's entry for {name!r} is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{path}: {name!r} has the dtype {dtype!r}; known: {', '.join(sorted(DTYPE_BYTES))}")
    if not _sizes(shape) or len(shape) > _RANK_LIMIT:
        raise InputError(f"{path}: {name!r} has the shape {str(shape)[:80]}; expected at most {_RANK_LIMIT} non-negative integers")
    if not _sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{path}: {name!r} has the data_offsets {str(offsets)[:80]}; expected two non-negative integers")
    needed = prod(shape) * DTYPE_BYTES[dtype]  # Python integers cannot overflow; _sizes bounds each factor
    if offsets[1] - offsets[0] != needed:
        found = f"its data_offsets span {offsets[1] - offsets[0]}"
        raise InputError(f"{path}: {name!r} of shape {shape} and dtype {dtype} needs {needed} bytes, {found}")
    return offsets[0], offsets[1], name, StoredTensor(path.name, dtype, tuple(shape), needed)


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise InputError(f"{where} is not valid JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a JSON {type(value).__name__}; expected an object")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"the key {name[:80]!r} is repeated")
        value[name] = item
    return value
