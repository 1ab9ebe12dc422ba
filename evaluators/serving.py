"""A model as a configuration would be served: packed weights behind their kernels, cut linears in their real shapes, sublayers left out.

Candidates of a search hold decoded values in the dense shapes (`candidate.py`); this is what is timed. A level that no kernel serves here
stands as a dense linear with its values. Whether a skipped sublayer can be left out whole is tried: its module is replaced by zeros, and
where that gives another result than zeros in its output projection (BERT adds the stream inside), only its linears are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import chain as chained
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear
from transformers import DynamicCache

from autoeff.errors import InputError
from autoeff.evaluators.bank import Bank, Chain, Step
from autoeff.kernels import linear_lowrank, linear_wq
from autoeff.kernels.dequantize_wq import PLANES
from autoeff.kernels.failures import of_device
from autoeff.spaces.knob import Knob, swap
from autoeff.spaces.sites import Linear, Site, Structure
from autoeff.spaces.space import SearchSpace

__all__ = [
    "FEW_ROWS",
    "Arbitrary",
    "Form",
    "LowRankLinear",
    "PackedLinear",
    "Stored",
    "copied",
    "decoding",
    "forms",
    "linear_of",
    "prefilling",
    "removable",
    "runs",
    "serve",
    "served",
]

FEW_ROWS = {False: 256, True: 32}
"""Up to so many rows the packed kernel of a CPU is used, by whether codes have more than 4 bits and so are read as two halves.

Above, decoding the weight and a dense product take less: on one core of a Zen 4, [192, 448] and [1024, 1024], the packed kernel took 0.4 to
0.9 of that time with 256 rows at 4 bits, and 1.0 with 32 rows at 8 bits.
"""
_Call = Callable[[], object]


@dataclass(frozen=True)
class Form:
    """What the levels in force make of a linear, or of one of its two factors.

    Attributes:
        linear: In the shape that is left.
        chain: The steps that make its values; empty where it is the model's own.
        kernel: The file of `kernels/` that serves it; None for a dense linear.
        settings: What the kernel must be told besides the shapes.
        silenced: Whether its sublayer is left out.
    """

    linear: Linear
    chain: Chain = ()
    kernel: str | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    silenced: bool = False


def forms(structure: Structure, space: SearchSpace, knobs: Mapping[str, Knob], indices: Sequence[int]) -> dict[str, tuple[Form, ...]]:
    """The form of every searchable linear by name; two where factors stand for it, in the order in which they act."""
    sites = {site.name: site for site in structure.sites}
    found: dict[str, tuple[Form, ...]] = {linear.name: (Form(linear),) for linear in structure.linears}
    for decision, i, on in zip(space.decisions, indices, space.active(indices), strict=True):
        if not (on and i):
            continue
        knob, site, level = knobs[decision.knob], sites[decision.site], decision.levels[i]
        if knob.silences(site, level):
            for linear in site.linears:
                found[linear.name] = tuple(replace(form, silenced=True) for form in found[linear.name])
        elif knob.of_values:
            as_left = replace(site, linears=tuple(form.linear for linear in site.linears for form in found[linear.name]))
            for name, linears in groupby(knob.left(as_left, level).linears, key=lambda linear: linear.of_model):
                before = found[name][0]
                form = replace(before, chain=(*before.chain, Step(knob, site, level)))
                if knob.kind != "structure":
                    form = replace(form, kernel=knob.kernel(as_left, level), settings=knob.kernel_settings(as_left, level))
                found[name] = tuple(replace(form, linear=linear) for linear in linears)
    return found


def served(kernel: str | None, settings: Mapping[str, int], linear: Linear, device: torch.device) -> bool:
    """Whether `serve` has a module for this kernel on a device: quantised linears, on a CPU in groups that are multiples of 32."""
    return kernel == "linear_wq" and not linear.experts and (device.type == "cuda" or settings["group"] % 32 == 0)


class PackedLinear(nn.Module):
    """y = x W^T + b from packed codes, in the dtype of x.

    Args:
        weight: Where x will be.
        bias: [N], or None.
    """

    def __init__(self, weight: linear_wq.Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = weight
        self.in_features, self.out_features = weight.k, weight.n
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._few = linear_wq.CpuWeight(weight) if weight.scale.device.type == "cpu" else None
        self._most = FEW_ROWS[weight.bits > 4] * weight.k

    def forward(self, x: Tensor) -> Tensor:
        if self._few is None:
            return linear_wq.linear(x, self.packed, self.bias)
        if x.numel() > self._most:
            return dense_linear(x, self.packed.dense(torch.float16).to(x.dtype), self.bias)
        y = self._few(x.to(torch.bfloat16)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class LowRankLinear(nn.Module):
    """y = U (V x) + b, in the dtype of x.

    Args:
        v: [R, K].
        u: [N, R].
        bias: [N], or None.
    """

    def __init__(self, v: Tensor, u: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = v.shape[1], len(u)
        self.v, self.u = (nn.Parameter(factor.contiguous(), requires_grad=False) for factor in (v, u))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear_lowrank.linear(x, self.v, self.u, self.bias)


class Weights(Protocol):
    """Where the values of changed linears come from."""

    def packed(self, form: Form) -> Mapping[str, Tensor]:
        """The tensors that the kernel reads, by their bare names."""

    def dense(self, form: Form) -> Tensor:
        """The values [N, K] as they are left."""

    def rows(self, form: Form) -> Tensor | None:
        """The outputs that are left; None for all."""

    def whole(self, form: Form) -> Tensor | None:
        """The parameter in the dense shape and layout, zero where something was cut; None where the model's own will do."""


class Stored:
    """The entries of a bank."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    def packed(self, form: Form) -> dict[str, Tensor]:
        prefix = f"{form.linear.name}."
        return {n.removeprefix(prefix): t for n, t in self._bank.packed(form.chain).items() if n.rpartition(".")[0] == form.linear.name}

    def dense(self, form: Form) -> Tensor:
        return self._bank.material(form.chain, [form.linear.of_model]).weights[form.linear.name]

    def rows(self, form: Form) -> Tensor | None:
        return self._bank.material(form.chain, [form.linear.of_model]).rows.get(form.linear.of_model)

    def whole(self, form: Form) -> Tensor:
        (whole,) = self._bank.decoded(form.chain, [form.linear.of_model]).values()
        return whole


class Arbitrary:
    """Random values: what a product takes does not depend on them."""

    def packed(self, form: Form) -> dict[str, Tensor]:
        n, k, bits, group = form.linear.out_features, form.linear.in_features, form.settings["bits"], form.settings["group"]
        planes = {f"plane{p}": torch.randint(0, 256, (n, -(-k * p // 8)), dtype=torch.uint8) for p in PLANES[bits]}
        scale = torch.rand(n, -(-k // group)).mul_(0.01).half()
        return {**planes, "scale": scale} | ({} if form.settings.get("symmetric") else {"minimum": scale * -(1 << bits - 1)})

    def dense(self, form: Form) -> Tensor:
        return torch.randn(form.linear.out_features, form.linear.in_features) * 0.02

    def rows(self, form: Form) -> Tensor | None:
        return torch.arange(form.linear.out_features)

    def whole(self, form: Form) -> None:
        return None


def serve(
    model: nn.Module,
    structure: Structure,
    space: SearchSpace,
    knobs: Mapping[str, Knob],
    indices: Sequence[int],
    weights: Weights,
    whole: frozenset[str],
    unserved: Collection[str] = (),
) -> None:
    """Turns a dense model into the served one of a configuration, for good.

    Args:
        model: Its modules are replaced; parameters that it shares with copies stay as they are.
        structure: Its sites; those of blocks that it lacks are passed over.
        space: The search space.
        knobs: By name.
        indices: Level indices.
        weights: Of the linears that are no longer the model's own.
        whole: Kinds of sublayers that are left out with their modules, as `removable` found.
        unserved: Knobs of which the dense shapes are kept, with zeros: the model does not run in smaller ones.
    """
    blocks = structure.blocks
    blocks_of = {linear.name: site.block for site in structure.sites for linear in site.linears}
    for name, parts in forms(structure, space, knobs, indices).items():
        form = parts[0]
        if not form.chain or form.silenced or not _there(model, blocks[blocks_of[name]]):
            continue
        if form.linear.experts or any(step.knob.name in unserved for step in form.chain):
            if (values := weights.whole(form)) is not None:
                _set(model, form.linear.weight, values)
        else:
            original = model.get_submodule(name)
            bias: Tensor | None = original.bias.data if isinstance(original.bias, Tensor) else None
            if bias is not None and (rows := weights.rows(parts[-1])) is not None:
                bias = bias[rows.to(bias.device)]
            own = original.weight
            assert isinstance(own, Tensor)
            _put(model, name, linear_of(own, bias, parts, weights))
    sites = {site.name: site for site in structure.sites}
    for decision, i in zip(space.decisions, space.normalised(indices), strict=True):
        site = sites[decision.site]
        if decision.branches[i] is None and _there(model, blocks[site.block]):
            for part in structure.sites if site.kind == "block" else (site,):
                if part.block == site.block and part.kind in ("attention", "ffn"):
                    _leave_out(model, part, whole)
        elif i and site.kind == "block" and _there(model, site.name):
            knobs[decision.knob].apply(model, site, decision.levels[i])


def removable(model: nn.Module, structure: Structure) -> frozenset[str]:
    """The kinds of sublayers whose modules may be replaced by zeros: tried with the first of each kind, on a few tokens."""
    found = set()
    for kind in ("attention", "ffn"):
        site = next((site for site in structure.sites if site.kind == kind), None)
        if site is None or not site.outputs or not _there(model, site.name) or site.name in structure.blocks:
            continue
        undo = swap(model, {name: torch.zeros_like(model.get_parameter(name)) for name in site.outputs})
        expected = _output(model)
        undo()
        without = copied(model)
        _leave_out(without, site, frozenset({kind}))
        try:
            if torch.allclose(_output(without), expected, rtol=1e-2, atol=1e-3):
                found.add(kind)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if of_device(error):
                raise
            continue  # the block wants more of the module than its output
    return frozenset(found)


def runs(model: nn.Module) -> bool:
    """Whether it does, in the shapes that it was given."""
    try:
        _output(model)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if of_device(error):
            raise
        return False
    return True


def copied(model: nn.Module) -> nn.Module:
    """A copy with modules of its own that shares every tensor."""
    shared = {id(tensor): tensor for tensor in chained(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def decoding(model: nn.Module, vocabulary: int, batch: int, context: int) -> _Call:
    """A call that decodes the last of `context` tokens of each of `batch` sequences; the cache is then as it was.

    Raises:
        InputError: The model keeps its cache in a form that cannot be filled.
    """
    device = next(model.parameters()).device
    cache: Any = DynamicCache(config=model.config)
    arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    ids = torch.randint(0, vocabulary, (batch, 1), device=device)
    with torch.inference_mode():
        model(input_ids=ids, **arguments)  # tells what a layer keeps of a token
        filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        for layer in cache.layers if filled else ():
            like = layer if layer in filled else filled[0]  # a layer whose attention is left out is as long as the others
            if not hasattr(layer, "update"):
                raise InputError(
                    f"the cache of {type(model).__name__} ({type(layer).__name__}) cannot be filled, so decode_ms is not known"
                )
            missing = max(0, context - 1 - (layer is like))
            shapes = [(*tensor.shape[:2], missing, tensor.shape[3]) for tensor in (like.keys, like.values)]
            layer.update(*(torch.randn(shape, device=device, dtype=like.keys.dtype) for shape in shapes))
    states = [dict(vars(layer)) for layer in cache.layers]
    if "position_ids" in signature(model.forward).parameters:
        arguments["position_ids"] = torch.full((batch, 1), context - 1, device=device)

    def call() -> object:
        for layer, state in zip(cache.layers, states, strict=True):
            vars(layer).update(state)
        with torch.inference_mode():
            return model(input_ids=ids, **arguments)

    return call


def prefilling(model: nn.Module, vocabulary: int, batch: int, context: int) -> _Call:
    """A call that processes `batch` prompts of `context` tokens: for decoders with the logits of the last token alone, and a new cache."""
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary, (batch, context), device=device)
    known = signature(model.forward).parameters
    arguments = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    cached = "past_key_values" in known and getattr(model, "get_output_embeddings", lambda: None)() is not None

    def call() -> object:
        new: dict[str, Any] = {"past_key_values": DynamicCache(config=model.config), "use_cache": True} if cached else {}
        with torch.inference_mode():
            return model(input_ids=ids, **arguments, **new)

    return call


def linear_of(own: Tensor, bias: Tensor | None, parts: Sequence[Form], weights: Weights) -> nn.Module:
    """What stands for a linear, in one form or as two factors.

    Args:
        own: Its parameter, for device and dtype.
        bias: Of the outputs that are left.
        parts: Of `forms`.
        weights: Of the parts.
    """
    *before, last = parts
    if before and not served(last.kernel, last.settings, last.linear, own.device):
        v, u = (weights.dense(form).to(own.device, own.dtype) for form in parts)
        return LowRankLinear(v, u, bias)
    modules = [_one(own, form, None, weights) for form in before]
    return nn.Sequential(*modules, _one(own, last, bias, weights)) if modules else _one(own, last, bias, weights)


def _one(own: Tensor, form: Form, bias: Tensor | None, weights: Weights) -> nn.Module:
    if served(form.kernel, form.settings, form.linear, own.device):
        packed = {name: part.to(own.device) for name, part in weights.packed(form).items()}
        planes = {name: part for name, part in packed.items() if name.startswith("plane")}
        bits, group = form.settings["bits"], form.settings["group"]
        return PackedLinear(linear_wq.Weight(planes, packed["scale"], packed.get("minimum"), bits, form.linear.in_features, group), bias)
    dense = nn.Linear(form.linear.in_features, form.linear.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weights.dense(form).to(own.device, own.dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense


class _Absent(nn.Module):
    """Zeros in the shape of what it is fed; a tuple of `items` with them in front where there are any."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self._items = items

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        zeros = hidden.new_zeros(1).expand_as(hidden)
        return (zeros, *[None] * (self._items - 1)) if self._items else zeros


class _Nothing(nn.Module):
    """A linear of zeros."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self._out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self._out_features)


def _leave_out(model: nn.Module, site: Site, whole: frozenset[str]) -> None:
    if site.kind in whole:
        _put(model, site.name, _Absent(_items(model, site.name)))
        return
    for linear in site.linears:
        if not linear.experts:
            _put(model, linear.name, _Nothing(linear.out_features))
        elif linear.weight in site.outputs:
            _set(model, linear.weight, torch.zeros_like(model.get_parameter(linear.weight)))


def _items(model: nn.Module, name: str) -> int:
    """How many things the module returns as a tuple; 0 for a bare tensor."""
    seen: list[object] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        _output(model)
    finally:
        handle.remove()
    return len(seen[0]) if isinstance(seen[0], tuple) else 0


@torch.no_grad()
def _output(model: nn.Module) -> Tensor:
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    output: Tensor = model(input_ids=ids)[0]
    return output.float()


def _there(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter of this model alone."""
    parent, _, child = name.rpartition(".")
    own = model.get_parameter(name)
    model.get_submodule(parent)._parameters[child] = nn.Parameter(value.to(own.device, own.dtype), requires_grad=False)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
