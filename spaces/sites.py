"""The places of a model where something can be decided, found by running it once and watching.

Nothing here is written for one model class. Blocks are the longest list of like modules that hold linears; the linears of a
block that are fed the very same tensor form one site (q/k/v, gate/up: runtimes fuse them, so they carry one decision); the
child of a block whose name or class says attention is the attention sublayer and the other linears are the FFN.
The model may live on the meta device: only shapes are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from autoeff.errors import InputError

__all__ = ["BYTES_DENSE", "Linear", "Site", "Structure", "find_structure"]

BYTES_DENSE = 2  # dense = 16 bit, whatever the checkpoint stores
_TRACE_TOKENS = 4


@dataclass(frozen=True)
class Linear:
    """A linear map inside a block.

    Attributes:
        name: Module path.
        in_features: K.
        out_features: N.
        bias: Whether it adds one.
        transposed: True where the weight is stored [K, N] (GPT-2's Conv1D) instead of [N, K].
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    transposed: bool = False

    @property
    def parameters(self) -> int:
        """Weight elements; the bias is not searchable and not counted."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Site:
    """A place that one decision of a knob can be about.

    Attributes:
        name: The common path and the members, e.g. `model.layers.0.self_attn.q_proj+k_proj+v_proj`.
        kind: `linears` for linears that agree, `attention` and `ffn` for whole sublayers.
        block: Index of the block.
        linears: Members, in the order in which they run.
        output: Module path of the projection that writes to the residual stream; sublayers only.
        kv_bytes: Cache bytes per token and sequence at 16 bit; attention of decoders only.
    """

    name: str
    kind: Literal["linears", "attention", "ffn"]
    block: int
    linears: tuple[Linear, ...]
    output: str | None = None
    kv_bytes: int = 0

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True)
class Structure:
    """What the knobs and the cost arithmetic need to know of a model.

    Attributes:
        model_type: As in its `config.json`.
        blocks: Module paths of the blocks, in order.
        sites: Every site, block by block, in the order in which they run.
        parameters: Elements of every tensor stored, shared ones once.
        head_parameters: Elements of the output head that is applied to every token; 0 for encoders.
        lookup_parameters: Elements of embedding tables of which a token reads one row (a table tied to the head is not one).
    """

    model_type: str
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    parameters: int
    head_parameters: int
    lookup_parameters: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every searchable linear once."""
        return tuple(linear for site in self.sites if site.kind == "linears" for linear in site.linears)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_structure(model: nn.Module, *, untie: bool = False) -> Structure:
    """The blocks and sites of `model`.

    Args:
        model: A transformers model, on any device including meta. It is run once on four tokens.
        untie: Give every linear a site of its own.

    Raises:
        InputError: A part of a block that cannot be understood; the message names the module.
    """
    blocks = _blocks(model)
    for path, block in blocks:
        _refuse_unknown_parts(block, path)
    runs, cache_bytes = _trace(model, blocks)
    _refuse_uncalled_and_shared(model, blocks, runs)
    sites: list[Site] = []
    for index, (path, block) in enumerate(blocks):
        called = [run for run in runs if run.linear.startswith(path + ".")]
        for kind in ("attention", "ffn"):
            members = [run for run in called if _is_attention(run.linear, path, block) == (kind == "attention")]
            if members:
                sites += _sublayer(model, kind, index, path, members, cache_bytes[index] if kind == "attention" else 0, untie)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return Structure(
        model_type=str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
        blocks=tuple(path for path, _ in blocks),
        sites=tuple(sites),
        parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=0 if head is None else head.weight.numel(),
        lookup_parameters=sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding) and (head is None or m.weight is not head.weight)
        ),
    )


@dataclass(frozen=True)
class _Run:
    linear: str
    fed: int  # identity of the input tensor


def _linears(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield f"{path}.{name}", child


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    best: list[tuple[str, nn.Module]] = []
    outer = "\0"  # path of the last list; lists inside it belong to its blocks
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or path.startswith(outer + "."):
            continue
        outer = path
        items = [(f"{path}.{i}", item) for i, item in enumerate(module)]
        like = len({type(item) for _, item in items}) == 1
        if like and len(items) > len(best) and any(True for _ in _linears(items[0][1], "")):
            best = items
    if not best:
        raise InputError(f"cannot understand {type(model).__name__}: no list of like blocks that hold linears was found")
    return best


def _refuse_unknown_parts(block: nn.Module, path: str) -> None:
    linears = {name for name, _ in _linears(block, path)}
    for name, module in block.named_modules(prefix=path):
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and any(linear.startswith(name + ".") for linear in linears):
            raise InputError(f"cannot understand {name}: a list of linears inside a block (experts?)")
    for name, parameter in block.named_parameters(prefix=path):
        if parameter.dim() >= 2 and name.rpartition(".")[0] not in linears:
            raise InputError(f"cannot understand {name}: a weight of shape {tuple(parameter.shape)} outside any linear")


def _refuse_uncalled_and_shared(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], runs: Sequence[_Run]) -> None:
    calls = Counter(run.linear for run in runs)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, block in blocks:
        for name, linear in _linears(block, path):
            if calls[name] != 1:
                raise InputError(f"cannot understand {name}: a plain forward pass calls this linear {calls[name]} times, not once")
            if owners[id(linear.weight)] != 1:
                raise InputError(f"cannot understand {name}: its weight is shared with another module")


def _trace(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> tuple[list[_Run], list[int]]:
    """The linears of the blocks in the order in which they run, and the cache bytes per token of each block."""
    runs: list[_Run] = []
    kept: list[object] = []  # alive until the end, so that identities are not reused

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            kept.append(next(iter((*args, *kwargs.values()))))
            runs.append(_Run(name, id(kept[-1])))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True) for path, block in blocks for name, module in _linears(block, path)
    ]
    tokens = torch.zeros(1, _TRACE_TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    # a checkpoint saved in the middle of a training may have switched its cache off
    options = {"use_cache": True} if "use_cache" in signature(model.forward).parameters else {}
    try:
        with torch.no_grad():
            output = model(input_ids=tokens, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot understand {type(model).__name__}: it does not run on token ids alone: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    cache = getattr(output, "past_key_values", None)
    return runs, [0 if cache is None else _bytes_per_token(cache.layers[i]) for i in range(len(blocks))]


def _bytes_per_token(layer: Any) -> int:
    """Keys and values [B=1, H, T, D] of one token, as the model itself keeps them."""
    return sum(int(kept.numel() // kept.shape[-2]) for kept in (layer.keys, layer.values)) * BYTES_DENSE


def _is_attention(linear: str, path: str, block: nn.Module) -> bool:
    child = linear.removeprefix(path + ".").split(".")[0]
    return "attn" in child.lower() or "attention" in (child + type(getattr(block, child)).__name__).lower()


def _sublayer(
    model: nn.Module, kind: Literal["attention", "ffn"], index: int, path: str, runs: Sequence[_Run], kv_bytes: int, untie: bool
) -> list[Site]:
    linears = tuple(_linear(run.linear, model.get_submodule(run.linear)) for run in runs)
    groups: dict[object, list[Linear]] = {}
    for run, linear in zip(runs, linears, strict=True):
        groups.setdefault(run.linear if untie else run.fed, []).append(linear)
    first, output = linears[0], linears[-1]
    if output.out_features != first.in_features:
        raise InputError(f"cannot understand {output.name}: {output.out_features} outputs do not fit a stream of {first.in_features}")
    common = _common_path([linear.name for linear in linears])
    name = common if common != path else f"{path}.{kind}"
    sites = [Site(_joined([member.name for member in members]), "linears", index, tuple(members)) for members in groups.values()]
    return [Site(name, kind, index, linears, output.name, kv_bytes), *sites]


def _linear(name: str, module: nn.Module) -> Linear:
    assert isinstance(module, nn.Linear | Conv1D)
    transposed = isinstance(module, Conv1D)
    n, k = reversed(module.weight.shape) if transposed else module.weight.shape
    return Linear(name, in_features=k, out_features=n, bias=module.bias is not None, transposed=transposed)


def _common_path(names: Sequence[str]) -> str:
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, parts))


def _joined(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    common = _common_path(names)
    return f"{common}.{'+'.join(name.removeprefix(common + '.') for name in names)}"
