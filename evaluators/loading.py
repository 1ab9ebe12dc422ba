"""From a model's name to checked facts and to the model itself. Models are data: safetensors and a bounded configuration, never code.

`inspect_model` reads headers only and proves, by building the model on the meta device, that the weights are the ones the
configuration asks for. `load_model` then allocates. transformers is handed tensors and a configuration object, no directory, so
that it looks for nothing else (adapters, pickles, remote code); its own renaming of legacy tensor names still applies.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from autoeff.errors import InputError
from autoeff.evaluators.checkpoint import StoredTensor, existing_path, read_checkpoint, read_json
from autoeff.evaluators.hub import refused_by_hub
from autoeff.evaluators.model_config import build_config, quiet_transformers, read_config, refuse_code
from autoeff.evaluators.widening import widen_on_use
from autoeff.spaces.sites import blank_inputs

if TYPE_CHECKING:  # importing them takes seconds, which a command that builds no model need not wait for
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelFacts",
    "check_memory",
    "compute_dtype",
    "inspect_model",
    "keeps_narrow",
    "load_model",
    "load_tokenizer",
    "memory_needed",
    "memory_of",
    "one_block",
    "random_model",
    "resolve_model",
    "skeleton",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab*",
    "merges*",
)
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "vocab*", "merges*")
_TOKENIZER_CONFIG_LIMIT = 16 << 20
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length", "n_ctx")
# Buffers that older versions of transformers stored and that newer ones compute.
_BUFFER = re.compile(r"(.*\.)?(position_ids|token_type_ids|inv_freq|original_inv_freq|masked_bias|attn\.bias|attention\.bias)")
_DECODER = re.compile(r".*(ForCausalLM|LMHeadModel)")
_GIVE = "give a decoder (…ForCausalLM), a text encoder or a model of images"
_CLASSIFIER = re.compile(r".*ForImageClassification")
_WIDE_BYTES = 1 << 30  # up to this size a float32 model is kept as such, which is a little faster


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before any weight is loaded.

    Attributes:
        path: Directory.
        model_type: As in `config.json`, known to the installed transformers.
        architectures: As in `config.json`.
        task: `decoder` predicts the next token; `encoder` gives sentence embeddings, `vision` those of images.
        config: The settings that the configuration class declares, nothing else.
        tensors: The stored tensors that the model uses, by stored name.
        arguments: For the model's constructor.
        parameters: Elements of the model's parameters, shared ones once.
        stored_bytes: Size of `tensors` on disk.
        dtype: What most elements of the weight matrices are stored in.
        store_dtype: float16 or bfloat16: what every weight is rounded to at load. Dense means these values.
        context: Longest sequence in tokens, or those of an image; None where the configuration does not say.
        vocabulary: Rows of the token embedding; 0 of one that reads images.
        digest: SHA-256 over the names and contents of weight, config and tokenizer files.
        notices: What the user must be told once.
    """

    path: Path
    model_type: str
    architectures: tuple[str, ...]
    task: Literal["decoder", "encoder", "vision"]
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    arguments: Mapping[str, Any]
    parameters: int
    stored_bytes: int
    dtype: torch.dtype
    store_dtype: torch.dtype
    context: int | None
    vocabulary: int
    digest: str
    notices: tuple[str, ...]


def resolve_model(reference: str) -> Path:
    """The directory of a model.

    Args:
        reference: A directory, the name of a bundled model, or a hub id (`owner/name`), looked for in this order.

    Raises:
        InputError: There is none, or the hub does not give it.
    """
    path = existing_path(reference)
    if path is not None and path.is_dir():
        return path.resolve()
    if path is not None:
        raise InputError(f"model {reference!r} is a file; expected the directory with config.json and model.safetensors")
    bundled = importlib.resources.files("autoeff") / "models"
    names = sorted(item.name for item in bundled.iterdir() if item.is_dir()) if bundled.is_dir() else []
    if reference in names:
        return Path(str(bundled / reference))
    if _HUB_ID.fullmatch(reference) and not reference.startswith("."):
        return _from_hub(reference)
    raise InputError(
        f"model {reference!r} does not exist; expected a directory with config.json and model.safetensors, "
        f"a bundled model ({', '.join(names) or 'none here'}), or a hub id such as owner/name"
    )


def inspect_model(path: Path) -> ModelFacts:
    """Checks a model directory without loading a weight.

    Raises:
        InputError: Anything that keeps the model from being loaded as data: see the first rule that is broken.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no model directory: config.json is missing; expected config.json, model.safetensors and a tokenizer")
    model_type, architectures, settings = read_config(path)
    if (path / "tokenizer_config.json").exists():
        refuse_code(read_json(path / "tokenizer_config.json", _TOKENIZER_CONFIG_LIMIT), path / "tokenizer_config.json")
    checkpoint = read_checkpoint(path)
    model, arguments = _on_meta(model_type, architectures, settings, {}), {}
    task = _task(model, architectures)
    used, missing = _matched(model, checkpoint.tensors, task, path)
    if missing and all("pooler." in name for name in missing) and "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        arguments = {"add_pooling_layer": False}
        model = _on_meta(model_type, architectures, settings, arguments)
        used, missing = _matched(model, checkpoint.tensors, task, path)
    if missing:
        raise InputError(f"{path}: the weights lack {missing[0]!r}, which config.json asks for ({len(missing)} missing in all)")
    store_dtype = _store_dtype(path, used)
    notices = []
    if rounded := sorted({_name(_FLOATS[t.dtype]) for t in used.values() if t.dtype in _FLOATS} - {_name(store_dtype)}):
        notices.append(
            f"{' and '.join(rounded)} weights are rounded to {_name(store_dtype)} at load; dense means these values, at 2 bytes each"
        )
    if heads := sorted(name for name in checkpoint.tensors.keys() - used.keys() if not _BUFFER.fullmatch(name)):
        notices.append(f"{len(heads)} tensors of a task head are left out, {heads[0]} among them")
    return ModelFacts(
        path=path,
        model_type=model_type,
        architectures=architectures,
        task=task,
        config=settings,
        tensors=used,
        arguments=arguments,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        stored_bytes=sum(tensor.bytes for tensor in used.values()),
        dtype=_main_dtype(used),
        store_dtype=store_dtype,
        context=_context(model),
        vocabulary=0 if task == "vision" else model.get_input_embeddings().weight.shape[0],
        digest=_digest(path, checkpoint.files),
        notices=tuple(notices),
    )


def skeleton(facts: ModelFacts) -> nn.Module:
    """The model on the meta device: shapes without memory."""
    model: nn.Module = _on_meta(facts.model_type, facts.architectures, facts.config, facts.arguments)
    return model


def one_block(facts: ModelFacts, device: torch.device) -> nn.Module:
    """The model with its first block only and arbitrary weights in the compute dtype, to be timed."""
    return _allocated(facts, device, compute_dtype(facts, device), 1, _untouched)


def random_model(facts: ModelFacts, device: torch.device, dtype: torch.dtype, blocks: int) -> nn.Module:
    """The model with its first `blocks` blocks and random weights in `dtype`, to be timed whole."""
    return _allocated(facts, device, dtype, blocks, lambda parameter, table: torch.empty_like(parameter).normal_(0, 0.02))


def _untouched(parameter: Tensor, table: bool) -> Tensor:
    """Pages of a table that are never touched take no memory."""
    return torch.zeros_like(parameter) if table else torch.ones_like(parameter)


def _allocated(
    facts: ModelFacts, device: torch.device, dtype: torch.dtype, blocks: int, make: Callable[[Tensor, bool], Tensor]
) -> nn.Module:
    config = build_config(facts.model_type, facts.config)
    config.num_hidden_layers = blocks
    with _parameters_on_meta():
        model: nn.Module = type(skeleton(facts))(config, **facts.arguments)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(p) for p in _head_parameters(model)}
    values: dict[int, nn.Parameter] = {}  # of tied parameters once
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in values:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                values[id(parameter)] = nn.Parameter(make(empty, id(parameter) in tables), requires_grad=False)
            module._parameters[name] = values[id(parameter)]
    model.config.dtype = dtype
    return model.eval().to(device)


def load_model(facts: ModelFacts, device: torch.device, narrow: Collection[str] = (), dtype: torch.dtype | None = None) -> nn.Module:
    """The dense model, for inference only: every weight rounded to `facts.store_dtype`; it computes in the compute dtype.

    Args:
        facts: Of the model's files. Weights that need no rounding stay mapped from them where they are kept in 16 bits.
        device: Where.
        narrow: Parameters that are kept in 16 bits although the compute dtype is float32, see `widening.py`. The others are kept
            in the compute dtype.
        dtype: Instead of the compute dtype.

    Raises:
        InputError: It cannot fit into memory, or the files have changed since they were inspected.
    """
    check_memory(facts, device)
    model_class: Any = type(skeleton(facts))
    state = {}
    try:
        for name, tensor in _stored_tensors(facts.path, facts.tensors):
            state[name] = tensor.to(facts.store_dtype) if tensor.is_floating_point() else tensor
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                None,
                config=build_config(facts.model_type, facts.config),
                state_dict=state,
                dtype=dtype or (facts.store_dtype if narrow else compute_dtype(facts, device)),
                output_loading_info=True,
                local_files_only=True,
                **facts.arguments,
            )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise InputError(f"cannot load {facts.path}: {str(error).splitlines()[0][:200]}") from None
    if odd := sorted(str(name) for name in [*report["missing_keys"], *report["mismatched_keys"]]):
        raise InputError(f"{facts.path}: transformers finds no weights for {odd[0]}")
    loaded: nn.Module = model.eval().requires_grad_(False).to(device)
    if narrow:
        _widen_the_rest(loaded, facts, narrow)
        widen_on_use(loaded, narrow)
    return loaded


def load_tokenizer(facts: ModelFacts) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    if not _tokenizer_files(facts.path):
        raise InputError(f"{facts.path} holds no tokenizer; expected tokenizer.json, or vocab and merges files, beside the weights")
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(facts.path), config=build_config(facts.model_type, facts.config), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # each tokenizer class fails in its own way on bad files
        raise InputError(f"the tokenizer in {facts.path} cannot be read: {str(error).strip()[:200].splitlines()[0]}") from None
    return tokenizer


def compute_dtype(facts: ModelFacts, device: torch.device) -> torch.dtype:
    """float32 on a CPU (the values stay those of the 16-bit store), the store's own dtype on a GPU."""
    return torch.float32 if device.type == "cpu" else facts.store_dtype


def keeps_narrow(facts: ModelFacts, device: torch.device) -> bool:
    """Whether the large matrices are kept in 16 bits although the device computes in float32."""
    return device.type == "cpu" and 4 * facts.parameters > _WIDE_BYTES


def memory_needed(facts: ModelFacts, device: torch.device) -> int:
    """Bytes that loading takes on `device` at the least.

    On a CPU: 16-bit weights where they are kept so, else float32 ones and their 16-bit originals. What evaluations hold on top is
    in `footprint.py`.
    """
    return facts.parameters * (6 if device.type == "cpu" and not keeps_narrow(facts, device) else 2)


def memory_of(device: torch.device) -> int:
    """Bytes that a device offers: all of a CPU's memory (caches are reclaimed) or of its control group, what is free on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(allowed)) if allowed.isdecimal() else total


def check_memory(facts: ModelFacts, device: torch.device) -> None:
    """Refuses a model whose weights alone cannot fit.

    Raises:
        InputError: It needs more than there is.
    """
    needed, available = memory_needed(facts, device), memory_of(device)
    if needed > available:
        raise InputError(
            f"{facts.path} needs {needed / 1e9:.1f} GB on {device} ({facts.parameters} parameters), {available / 1e9:.1f} GB are there; "
            f"use a smaller model or a larger machine"
        )


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(model_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the client lets the errors of several HTTP and storage libraries through
        raise refused_by_hub("model", model_id, error) from None
    if not any(path.glob("*.safetensors")):
        raise InputError(f"model {model_id!r} has no safetensors on the hub; other weights are never loaded: give a repository with them")
    return path


def _on_meta(model_type: str, architectures: Sequence[str], settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> PreTrainedModel:
    config = build_config(model_type, settings)
    mapping: Any = MODEL_MAPPING
    if _any(_DECODER, architectures):
        mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    elif _any(_CLASSIFIER, architectures):
        mapping = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise InputError(f"transformers has no {architectures[0]} for model_type {model_type!r}; {_GIVE}")
    found = mapping[type(config)]
    classes = found if isinstance(found, tuple | list) else (found,)
    model_class = next((c for c in classes if c.__name__ in architectures), classes[0])
    if getattr(model_class, "main_input_name", None) not in ("input_ids", "pixel_values"):
        raise InputError(f"model_type {model_type!r} reads neither text nor images; {_GIVE}")
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = model_class(config, **arguments)
    except Exception as error:  # whatever a constructor trips over: activation names, sizes that do not divide, overflow
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"config.json describes no model that transformers can build as {model_type!r}: {reason}") from None
    return model.eval()


def _task(model: PreTrainedModel, architectures: Iterable[str]) -> Literal["decoder", "encoder", "vision"]:
    if model.main_input_name == "pixel_values":
        return "vision"
    return "decoder" if _any(_DECODER, architectures) else "encoder"


def _any(pattern: re.Pattern[str], names: Iterable[str]) -> bool:
    return any(pattern.fullmatch(name) for name in names)


def _widen_the_rest(model: nn.Module, facts: ModelFacts, narrow: Collection[str]) -> None:
    """Gives a model that was loaded in 16 bits what it would have in float32, but for the parameters in `narrow`.

    Buffers that no file holds (rotary frequencies, scales) are computed anew, so that they are not rounded.
    """
    kept = {id(model.get_parameter(name)) for name in narrow}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    stored = model.state_dict().keys()
    with _parameters_on_meta():
        computed = type(model)(build_config(facts.model_type, facts.config), **facts.arguments)
    for name, buffer in computed.named_buffers():
        found = model.get_buffer(name)
        found.data = found.data.float() if name in stored and found.is_floating_point() else found.data if name in stored else buffer
    model.config.dtype = torch.float32


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [] if head is None else list(head.parameters())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have buffers, but no memory for parameters."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        with quiet_transformers():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _matched(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], task: str, path: Path
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensors that the model uses, and the names of those that it lacks.

    Names are matched as transformers does: exact, with the base model's prefix added or removed, LayerNorm's old spelling, and
    as `save_pretrained` writes them where that differs (experts one by one).

    Raises:
        InputError: A shape or dtype is wrong, or a tensor belongs to nothing.
    """
    expected = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix + "."
    prefixed = any(name.startswith(prefix) for name in stored)

    def spellings(name: str) -> tuple[str, ...]:
        modern = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))
        return modern, prefix + modern, modern.removeprefix(prefix)

    present = {spelling for name in stored for spelling in spellings(name)}
    parts = {name: {name: parameter} for name, parameter in expected.items()}
    parts |= {name: _as_saved(model, name, parameter) for name, parameter in expected.items() if name not in present}
    owners = {part: name for name, tensors in parts.items() for part in tensors}
    used, found = {}, set()
    for name, tensor in stored.items():
        part = next((spelling for spelling in spellings(name) if spelling in owners), None)
        if part is None:
            if _BUFFER.fullmatch(name) or (task != "decoder" and prefixed and not name.startswith(prefix)):
                continue
            raise InputError(f"{path}: the weights hold {name!r}, which a {type(model).__name__} of this config.json does not have")
        wanted = parts[owners[part]][part]
        shape = tuple(wanted.shape)
        if tensor.shape != shape:
            raise InputError(f"{path}: {name!r} has the shape {tensor.shape} in {tensor.file}, config.json asks for {shape}")
        if wanted.is_floating_point() and tensor.dtype not in _FLOATS:
            raise InputError(f"{path}: {name!r} is stored as {tensor.dtype}, which is quantised; expected {', '.join(_FLOATS)}")
        used[name] = tensor
        found.add(part)
    filled = {id(expected[name]) for name, tensors in parts.items() if found.issuperset(tensors)}  # tied ones are one object
    return used, [part for name, tensors in parts.items() if id(expected[name]) not in filled for part in tensors if part not in found]


def _as_saved(model: PreTrainedModel, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors as which `save_pretrained` writes one parameter, by stored name."""
    saved: dict[str, Tensor] = revert_weight_conversion(model, {name: parameter})
    return saved


def _context(model: PreTrainedModel) -> int | None:
    """Longest sequence in tokens, or those of an image. RoBERTa counts positions from behind its padding id, less as many of its table."""
    if model.main_input_name == "pixel_values":
        return _tokens_of_an_image(model)
    length = next((value for key in _CONTEXT_KEYS if isinstance(value := getattr(model.config, key, None), int)), None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None and module.num_embeddings == length:
            return length - module.padding_idx - 1
    return length


def _tokens_of_an_image(model: PreTrainedModel) -> int:
    body: Any = model.base_model
    try:
        with torch.no_grad():
            states: Tensor = body(**blank_inputs(model, 1, 1)).last_hidden_state
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"cannot understand {type(model).__name__}: it does not run on an image alone: {reason}") from None
    return states.shape[1]


def _store_dtype(path: Path, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """bfloat16 for bfloat16 matrices; else float16 if it represents every value finitely, else bfloat16."""
    if {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1} == {"BF16"}:
        return torch.bfloat16
    store = torch.float16
    wide = {name: tensor for name, tensor in tensors.items() if tensor.dtype in _FLOATS and tensor.dtype != "F16"}
    for name, tensor in _stored_tensors(path, wide):
        peak = tensor.abs().max() if tensor.numel() else torch.zeros(())
        if not peak.to(torch.bfloat16).isfinite():
            raise InputError(f"{path}: {name!r} holds values that are not finite at 16 bit; the checkpoint is damaged")
        if not peak.to(torch.float16).isfinite():
            store = torch.bfloat16
    return store


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _main_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    elements: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) > 1 and tensor.dtype in _FLOATS:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    return _FLOATS[max(elements, key=lambda dtype: elements[dtype])] if elements else torch.float32


def _stored_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, Tensor]]:
    """Memory-mapped tensors, file by file."""
    for file in sorted({tensor.file for tensor in tensors.values()}):
        with safe_open(path / file, framework="pt") as handle:
            for name, tensor in tensors.items():
                if tensor.file == file:
                    yield name, handle.get_tensor(name)


def _tokenizer_files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file() and any(fnmatch(p.name, pattern) for pattern in _TOKENIZER_FILES))


def _digest(path: Path, weights: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted({*weights, path / "config.json", *_tokenizer_files(path)}):
        with file.open("rb") as handle:
            total.update(f"{file.name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
