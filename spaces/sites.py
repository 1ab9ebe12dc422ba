"""The places of a model where something can be decided, found by running it once and watching.

Nothing here is written for one model class. Blocks are the longest list of like modules that hold linears; the linears of a
block that are fed the very same tensor form one site (q/k/v, gate/up: runtimes fuse them, so they carry one decision); the
child of a block whose name or class says attention is the attention sublayer and the other linears are the FFN.
In a mixture of experts the stacked weights of a layer's experts form one site, since kernels for experts serve all of them at
once; what decides between experts (the router, the gate of a shared expert) stays dense: it is small and sensitive.
The model may live on the meta device: only shapes are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autoeff.errors import InputError

__all__ = ["BYTES_DENSE", "Coupling", "KeyValues", "Linear", "Site", "Structure", "blank_inputs", "find_structure"]

BYTES_DENSE = 2  # dense = 16 bit, whatever the checkpoint stores
_TRACE_TOKENS = 4


@dataclass(frozen=True)
class Linear:
    """A linear map inside a block, or the same map of every expert of a layer.

    Attributes:
        name: Module path; of experts the path of their stacked parameter.
        in_features: K.
        out_features: N, of one expert.
        bias: Whether it adds one.
        transposed: True where the weight is stored [K, N] (GPT-2's Conv1D) instead of [N, K].
        experts: E where the weight is a parameter [E, N, K] that holds a map for each expert; else 0.
        experts_per_token: Experts that a token is sent to.
        passes: How often a token is multiplied by it, on average. Only knobs set it, for those that come after them.
        together: Tokens of a batch that are decoded at once; they are sent to experts, and skip channels, each on its own.
        kept: Weights that every row keeps; None for all. Only knobs set it, for those that come after them.
        factor_of: The linear of which it is one of two factors; None for a linear of the model itself.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    transposed: bool = False
    experts: int = 0
    experts_per_token: int = 0
    passes: float = 1
    together: int = 1
    kept: int | None = None
    factor_of: str | None = None

    @property
    def weight(self) -> str:
        """Parameter name of the weight."""
        return self.name if self.experts else f"{self.name}.weight"

    @property
    def of_model(self) -> str:
        """Name of the linear of the model that it is, or is a factor of."""
        return self.factor_of or self.name

    def factors(self, rank: int) -> tuple[Linear, Linear]:
        """V [rank, K], which is fed what this linear is, and U [N, rank], which is fed what comes out of V."""
        v = replace(self, name=f"{self.name}.v", out_features=rank, bias=False, transposed=False, factor_of=self.name)
        u = replace(self, name=f"{self.name}.u", in_features=rank, transposed=False, factor_of=self.name)
        return v, u

    @property
    def rows(self) -> int:
        """Rows of K weights in all: N, or E x N."""
        return self.out_features * max(1, self.experts)

    @property
    def parameters(self) -> int:
        """Weight elements of all experts; the bias is not searchable and not counted."""
        return self.in_features * self.rows

    @property
    def kept_parameters(self) -> int:
        """Weight elements that are not pruned."""
        return self.rows * (self.in_features if self.kept is None else self.kept)

    @property
    def parameters_per_token(self) -> int:
        """Weight elements that one token is multiplied by, those of every pass."""
        return int(self.in_features * self.out_features * self.passes * (self.experts_per_token if self.experts else 1))

    @property
    def experts_read(self) -> int:
        """Experts that the tokens decoded at once are sent to, at the most."""
        return min(self.experts, self.together * self.experts_per_token)

    @property
    def reads(self) -> int:
        """How often its weights are read: once, also where some tokens pass it by."""
        return max(1, int(self.passes))

    @property
    def read_parameters(self) -> int:
        """Weight elements that are read to decode them."""
        return self.in_features * self.out_features * self.reads * (self.experts_read if self.experts else 1)


@dataclass(frozen=True)
class Coupling:
    """The units of a sublayer: without the rows and columns of one of them the others compute what they did.

    Attributes:
        units: How many units U there are, in the order of their first columns.
        rows: Outputs of the sublayer's first linears (and elements of their biases) by name, ascending, int64 [U, r].
        columns: Inputs of its last linear by name, ascending, int64 [U, c]; over all units each input occurs once.
    """

    units: int
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]


@dataclass(frozen=True)
class KeyValues:
    """What an attention layer keeps of every token, where knobs may decide about it.

    Attributes:
        key_size: Numbers of a key, per KV head.
        value_size: Numbers of a value, per KV head.
        window: Tokens of a sliding window; None where attention sees everything.
        context: Tokens of the job's context; 0 where none is known.
        kept: Tokens that the cache keeps of them. Only knobs set it lower, for those that come after them.
    """

    key_size: int
    value_size: int
    window: int | None = None
    context: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Site:
    """A place that one decision of a knob can be about.

    Attributes:
        name: The common path and the members, e.g. `model.layers.0.self_attn.q_proj+k_proj+v_proj`.
        kind: `linears` for linears that agree, `attention` and `ffn` for whole sublayers, `block` for both of them, `keys` and `values`
            for what attention keeps.
        block: Index of the block.
        linears: Members, in the order in which they run.
        output: Module path of the projection that writes to the residual stream; sublayers without experts only.
        kv_bytes: Cache bytes per token and sequence at 16 bit; attention of decoders only.
        outputs: Names of the parameters (weights and biases) of every projection that writes to the residual stream: with zeros
            in all of them the sublayer adds nothing; sublayers only.
        kv: What attention keeps of a token; attention, keys and values only.
        activation: Name that the model's configuration has for the activation function; FFNs only.
        coupling: Its units, where `couplings.py` was asked and found some; sublayers only.
    """

    name: str
    kind: Literal["linears", "attention", "ffn", "block", "keys", "values"]
    block: int
    linears: tuple[Linear, ...]
    output: str | None = None
    kv_bytes: int = 0
    outputs: tuple[str, ...] = ()
    kv: KeyValues | None = None
    activation: str = ""
    coupling: Coupling | None = field(default=None, compare=False, repr=False)

    @property
    def attention(self) -> str:
        """Module path of the attention whose keys and values this site is about; sites with `kv` only."""
        return self.name if self.kind == "attention" else self.name.rpartition(".")[0]

    @property
    def kv_heads(self) -> int:
        """KV heads; 0 where nothing is kept."""
        return 0 if self.kv is None else self.kv_bytes // (BYTES_DENSE * (self.kv.key_size + self.kv.value_size))

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears)

    @property
    def parameters_per_token(self) -> int:
        return sum(linear.parameters_per_token for linear in self.linears)


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

    def with_blocks(self) -> Structure:
        """The same structure with a site for every block, before those of its sublayers."""
        sites: list[Site] = []
        for index, path in enumerate(self.blocks):
            of_block = [site for site in self.sites if site.block == index]
            parts = [site for site in of_block if site.kind in ("attention", "ffn")]
            linears = tuple(linear for part in parts for linear in part.linears)
            outputs = tuple(name for part in parts for name in part.outputs)
            sites += [Site(path, "block", index, linears, kv_bytes=sum(part.kv_bytes for part in parts), outputs=outputs), *of_block]
        return replace(self, sites=tuple(sites))

    def at_batch(self, tokens: int) -> Structure:
        """The same structure where so many tokens are decoded at once, which matters where each reads weights of its own choice."""
        sites = (replace(site, linears=tuple(replace(linear, together=tokens) for linear in site.linears)) for site in self.sites)
        return replace(self, sites=tuple(sites))

    def at_context(self, tokens: int) -> Structure:
        """The same structure with what a cache of so many tokens keeps: behind each attention a site for its keys and one for its values.

        Layers with a sliding window below that keep what their own rule says, and nothing is decided about their caches.
        """
        sites: list[Site] = []
        for site in self.sites:
            if site.kv is not None:
                slides = site.kv.window is not None and site.kv.window < tokens
                site = replace(site, kv=None if slides else replace(site.kv, context=tokens, kept=tokens))
            sites.append(site)
            if site.kind == "attention" and site.kv is not None:
                sites += [
                    Site(f"{site.name}.{kind}", kind, site.block, (), kv_bytes=site.kv_bytes, kv=site.kv) for kind in ("keys", "values")
                ]
        return replace(self, sites=tuple(sites))


def find_structure(model: nn.Module, *, untie: bool = False) -> Structure:
    """The blocks and sites of `model`.

    Args:
        model: A transformers model, on any device including meta. It is run once on four tokens, or on an image.
        untie: Give every linear a site of its own.

    Raises:
        InputError: A part of a block that cannot be understood; the message names the module.
    """
    blocks = _blocks(model)
    for path, block in blocks:
        _refuse_unknown_parts(block, path)
    runs, kept = _trace(model, blocks)
    _refuse_uncalled_and_shared(model, blocks, runs)
    sites: list[Site] = []
    for index, (path, block) in enumerate(blocks):
        called = [run for run in runs if run.linear.name.startswith(path + ".")]
        mixtures = [name for name, _ in _mixtures(block, path)]
        for kind in ("attention", "ffn"):
            members = [run for run in called if _is_attention(run.linear.name, path, block) == (kind == "attention")]
            if members:
                cached = kept[index] if kind == "attention" else None
                sublayer, *inside = _sublayer(kind, index, path, members, mixtures, _bytes_per_token(cached), untie)
                named = _activation(model) if kind == "ffn" else ""
                sites += [replace(sublayer, kv=_key_values(model, sublayer, cached), activation=named), *inside]
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
    linear: Linear
    fed: int  # identity of the input tensor


def _linears(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The linears under `path` that can be decided about."""
    chosen = {id(part) for _, mixture in _mixtures(module, path) for chooser in _choosers(mixture) for part in chooser.modules()}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D) and id(child) not in chosen:
            yield f"{path}.{name}", child


def _experts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold the stacked weights of experts, parameters [E, N, K]."""
    for name, child in module.named_modules(prefix=path):
        if any(parameter.dim() == 3 for parameter in child.parameters(recurse=False)):
            yield name, child


def _mixtures(block: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold experts and what chooses between them."""
    for name, _ in _experts(block, path):
        parent = name.rpartition(".")[0]
        yield parent, block.get_submodule(parent.removeprefix(path).removeprefix("."))


def _choosers(mixture: nn.Module) -> Iterator[nn.Module]:
    """A mixture's router, whose weights have a row for each expert, and the gate of its shared expert, which has one row."""
    sizes = {parameter.shape[0] for _, experts in _experts(mixture, "") for parameter in experts.parameters(recurse=False)} | {1}
    for child in mixture.children():
        matrices = [parameter for parameter in child.parameters() if parameter.dim() == 2]
        if matrices and all(matrix.shape[0] in sizes for matrix in matrices):
            yield child


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
    for name, experts in _experts(block, path):
        _refuse_unknown_experts(name, experts)
    chosen = {id(weight) for _, mixture in _mixtures(block, path) for chooser in _choosers(mixture) for weight in chooser.parameters()}
    stacked = {id(parameter) for _, experts in _experts(block, path) for parameter in experts.parameters(recurse=False)}
    for name, parameter in block.named_parameters(prefix=path):
        if parameter.dim() >= 2 and name.rpartition(".")[0] not in linears and id(parameter) not in chosen | stacked:
            raise InputError(f"cannot understand {name}: a weight of shape {tuple(parameter.shape)} outside any linear")


def _refuse_unknown_experts(name: str, experts: nn.Module) -> None:
    """Understood is what Mixtral and its kin have: gate and up stacked into [E, 2F, K], and [E, K, F] back."""
    shapes = {f"{name}.{key}": tuple(parameter.shape) for key, parameter in experts.named_parameters()}
    match list(shapes.values()):
        case [(e, n, k), (e2, k2, f)] if (e, k, n) == (e2, k2, 2 * f) and not getattr(experts, "is_transposed", False):
            return
    found = ", ".join(f"{key.rpartition('.')[2]} {shape}" for key, shape in shapes.items())
    raise InputError(f"cannot understand {name}: {found}; expected a linear, or experts with gate and up as (E, 2F, K), down as (E, K, F)")


def _refuse_uncalled_and_shared(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], runs: Sequence[_Run]) -> None:
    calls = Counter(run.linear.name for run in runs)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, block in blocks:
        weights = {name: linear.weight for name, linear in _linears(block, path)}
        weights |= {f"{name}.{key}": parameter for name, experts in _experts(block, path) for key, parameter in experts.named_parameters()}
        for name, weight in weights.items():
            if calls[name] != 1:
                raise InputError(f"cannot understand {name}: a plain forward pass calls this linear {calls[name]} times, not once")
            if owners[id(weight)] != 1:
                raise InputError(f"cannot understand {name}: its weight is shared with another module")


def _trace(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> tuple[list[_Run], list[Any]]:
    """The linears of the blocks in the order in which they run, and the layer of the cache that each block fills, or None."""
    runs: list[_Run] = []
    kept: list[object] = []  # alive until the end, so that identities are not reused

    def watch(name: str, module: nn.Linear | Conv1D) -> Any:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            kept.append(next(iter((*args, *kwargs.values()))))
            runs.append(_Run(_linear(name, module), id(kept[-1])))

        return hook

    def instead(name: str, experts: nn.Module) -> Any:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            """What experts are fed becomes known; on the meta device they could not run, since who goes where is not."""
            hidden, *routing = (*args, *kwargs.values())
            kept.append(routing)
            chosen = next((tensor.shape[-1] for tensor in routing if tensor.dtype == torch.long), 0)
            runs.extend(_Run(linear, id(routing)) for linear in _stacked(name, experts, chosen))
            return torch.empty_like(hidden)

        return forward

    handles = []
    mixed = [found for path, block in blocks for found in _experts(block, path)]
    for path, block in blocks:
        handles += [module.register_forward_pre_hook(watch(name, module), with_kwargs=True) for name, module in _linears(block, path)]
    head, given = getattr(model, "get_output_embeddings", lambda: None)(), []
    if head is not None:
        handles.append(head.register_forward_hook(lambda _, __, output: given.append(output)))
    fed = blank_inputs(model, 1, _TRACE_TOKENS)
    # a checkpoint saved in the middle of a training may have switched its cache off
    options = {"use_cache": True} if "use_cache" in signature(model.forward).parameters else {}
    for name, experts in mixed:
        experts.forward = instead(name, experts)
    config: Any = getattr(model, "config", None)
    padding = getattr(config, "pad_token_id", None)
    try:
        if padding is not None:
            # some models look for it among the tokens, which have no values on the meta device; set past the checks of strict classes
            vars(config)["pad_token_id"] = None
        with torch.no_grad():
            output = model(**fed, **options)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        alone = f"it does not run on {next(iter(fed))} alone: {reason[0][:200]}"
        raise InputError(f"cannot understand {type(model).__name__}: {alone}") from error
    finally:
        if padding is not None:
            vars(config)["pad_token_id"] = padding
        for handle in handles:
            handle.remove()
        for _, experts in mixed:
            del experts.forward  # what its class says is in force again
    if given and getattr(output, "logits", given[-1]) is not given[-1]:
        raise InputError(f"cannot understand {type(model).__name__}: it changes the logits that its head gives (caps or scales them?)")
    cache = getattr(output, "past_key_values", None)
    layers = [None] * len(blocks) if cache is None else list(getattr(cache, "layers", []))
    if len(layers) != len(blocks):
        raise InputError(f"cannot understand {type(model).__name__}: its cache has {len(layers)} layers, it has {len(blocks)} blocks")
    return runs, layers


def blank_inputs(model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    """What a model can be run on to see what it does: token ids [batch, tokens], or, of one that sees, an image [1, C, H, W]."""
    device = next(model.parameters()).device
    if getattr(model, "main_input_name", None) != "pixel_values":
        return {"input_ids": torch.zeros(batch, tokens, dtype=torch.long, device=device)}
    config: Any = model.config
    height, width = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size, config.image_size)
    return {"pixel_values": torch.zeros(1, config.num_channels, height, width, device=device)}


def _bytes_per_token(layer: Any) -> int:
    """Keys and values [B=1, H, T, D] of one token, as the model itself keeps them; layers that attend to nothing keep none."""
    if getattr(layer, "keys", None) is None:
        return 0
    return sum(int(kept.numel() // kept.shape[-2]) for kept in (layer.keys, layer.values)) * BYTES_DENSE


def _key_values(model: nn.Module, site: Site, layer: Any) -> KeyValues | None:
    """What knobs may decide about: nothing where another attention cannot be put in its place."""
    if getattr(layer, "keys", None) is None or not getattr(model, "_supports_attention_backend", False):
        return None
    module = dict(model.named_modules()).get(site.name)
    if getattr(module, "config", None) is None or getattr(module, "layer_idx", None) is None:
        return None
    return KeyValues(layer.keys.shape[-1], layer.values.shape[-1], getattr(layer, "sliding_window", None))


def _activation(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return next((str(found) for name in names if isinstance(found := getattr(config, name, None), str)), "")


def _is_attention(linear: str, path: str, block: nn.Module) -> bool:
    child = linear.removeprefix(path + ".").split(".")[0]
    return "attn" in child.lower() or "attention" in (child + type(getattr(block, child)).__name__).lower()


def _sublayer(
    kind: Literal["attention", "ffn"],
    index: int,
    path: str,
    runs: Sequence[_Run],
    mixtures: Sequence[str],
    kv_bytes: int,
    untie: bool,
) -> list[Site]:
    linears = tuple(run.linear for run in runs)
    groups: dict[object, list[Linear]] = {}
    for run in runs:
        groups.setdefault(run.linear.name if untie else run.fed, []).append(run.linear)
    first = linears[0]
    outputs = [linears[-1]]
    mixture = next((name for name in mixtures if any(linear.name.startswith(name + ".") for linear in linears)), None)
    if mixture is not None:
        outputs = _outputs_of_mixture(mixture, linears)
    for output in outputs:
        if output.out_features != first.in_features:
            raise InputError(f"cannot understand {output.name}: {output.out_features} outputs do not fit a stream of {first.in_features}")
    common = _common_path([linear.name for linear in linears])
    sublayer = Site(
        name=mixture or (common if common != path else f"{path}.{kind}"),
        kind=kind,
        block=index,
        linears=linears,
        output=outputs[0].name if mixture is None else None,
        kv_bytes=kv_bytes,
        outputs=tuple(name for linear in outputs for name in (linear.weight, *([f"{linear.name}.bias"] if linear.bias else []))),
    )
    return [sublayer, *(Site(_joined([m.name for m in members]), "linears", index, tuple(members)) for members in groups.values())]


def _outputs_of_mixture(mixture: str, linears: Sequence[Linear]) -> list[Linear]:
    """The last linear of the experts and the last one of every expert that is shared by all tokens."""
    last: dict[str, Linear] = {}
    for linear in linears:
        if not linear.name.startswith(mixture + "."):
            raise InputError(f"cannot understand {linear.name}: it lies beside the mixture of experts {mixture}")
        last[linear.name.removeprefix(mixture + ".").split(".")[0]] = linear
    return list(last.values())


def _linear(name: str, module: nn.Linear | Conv1D) -> Linear:
    transposed = isinstance(module, Conv1D)
    n, k = reversed(module.weight.shape) if transposed else module.weight.shape
    return Linear(name, in_features=k, out_features=n, bias=module.bias is not None, transposed=transposed)


def _stacked(name: str, module: nn.Module, chosen: int) -> Iterator[Linear]:
    for key, parameter in module.named_parameters():
        experts, n, k = parameter.shape
        yield Linear(f"{name}.{key}", in_features=k, out_features=n, bias=False, experts=experts, experts_per_token=chosen)


def _common_path(names: Sequence[str]) -> str:
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, parts))


def _joined(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    common = _common_path(names)
    return f"{common}.{'+'.join(name.removeprefix(common + '.') for name in names)}"
