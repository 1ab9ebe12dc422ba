"""A cache that keeps some of the tokens, in fewer bits: what the levels of the knobs of kind `cache` put in force.

A layer under a plan works in rounds. It attends to what it keeps and to the tokens that arrive; then it scores, evicts and packs. A
prompt arrives in blocks, text that is generated in intervals of a few tokens. After a round `budget - interval` tokens are kept, so the
cache never holds more than its budget while text is generated; while a prompt is read it holds a block of one layer besides. Sinks
and window (the first and the last tokens) are never evicted. Of the tokens before the last `recent` ones, whole groups are packed.

Blocks of a layer depend on that layer's earlier blocks alone, so a text that is known goes through the model at once, and only
attention runs round by round: the result is that of block prefill followed by decoding token by token.

    streaming   the sinks and the most recent tokens            StreamingLLM, arXiv:2309.17453
    h2o         attention received so far, by query that saw it  H2O, arXiv:2306.14048
    snapkv      attention from the window's queries, pooled      SnapKV, arXiv:2404.14469
    tova        attention from the last query, all heads alike   TOVA, arXiv:2401.06104
    packing     keys by channel and group, values by token       KIVI, arXiv:2402.02750
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool1d
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoeff.errors import InputError

__all__ = [
    "POLICIES",
    "Basis",
    "KvCache",
    "KvPlan",
    "KvState",
    "Sizes",
    "continuation_start",
    "packed_bytes",
    "plan_part",
    "plans_of",
    "rounded",
    "seen_by",
    "sees_all",
    "watched",
    "wide",
]

POLICIES = ("streaming", "h2o", "snapkv", "tova")
_NAME = "autoeff_kv"  # of the attention function, as transformers knows it
_LEAST_GROUP = 16  # that kernels take
_TABLE_BYTES = 4  # scale and minimum, fp16 each


@dataclass(frozen=True)
class Sizes:
    """A plan at a context of so many tokens.

    Attributes:
        budget: Most tokens kept while text is generated; None for all.
        sinks: First tokens that stay.
        window: Last tokens that stay.
        block: Tokens of a prompt between two evictions.
        interval: Generated tokens between two evictions.
        recent: Last tokens that are not packed.
        group: Tokens that share the scales of packed keys.
    """

    budget: int | None
    sinks: int
    window: int
    block: int
    interval: int
    recent: int
    group: int

    @property
    def least(self) -> int:
        """The least budget that leaves sinks, window and room for an interval."""
        return self.sinks + self.window + self.interval

    @property
    def rest(self) -> int | None:
        """Tokens kept after a round; no fewer than must stay, where a text is too short for the budget."""
        return None if self.budget is None else max(self.budget - self.interval, self.sinks + self.window)

    def packed(self, tokens: int) -> int:
        """How many of so many tokens are packed right after a round."""
        return max(0, tokens - self.recent) // self.group * self.group


@dataclass(frozen=True, eq=False)
class Basis:
    """Axes along which keys or values are kept, head by head.

    Attributes:
        mean: [KV heads, D].
        axes: Orthonormal columns, [KV heads, D, rank].
    """

    mean: Tensor
    axes: Tensor

    def coordinates(self, numbers: Tensor) -> Tensor:
        """[B, KV heads, n, rank] of [B, KV heads, n, D]."""
        return (numbers - self.mean[:, None].to(numbers.dtype)) @ self.axes.to(numbers.dtype)

    def numbers(self, coordinates: Tensor) -> Tensor:
        """What they stand for; with as many axes as numbers it is what they were."""
        return coordinates @ self.axes.mT.to(coordinates.dtype) + self.mean[:, None].to(coordinates.dtype)


@dataclass(frozen=True)
class KvPlan:
    """What a layer keeps of the keys and values. Lengths are tokens; for small contexts they shrink, see `sizes`.

    Attributes:
        share: Of the context that is kept.
        policy: Which tokens, one of `POLICIES`.
        sinks: First tokens that stay, at most a 64th of the context.
        window: Last tokens that stay, at most a 32nd.
        block: Tokens of a prompt between two evictions, at most an eighth.
        pool: Neighbours whose maximum counts as a token's score; snapkv only.
        key_bits: 16, 8, 4 or 2.
        value_bits: As `key_bits`.
        group: Tokens that share the scales of packed keys, a power of two; at most a 16th of the context, at least 16.
        recent: Last tokens that are not packed, at most a 32nd of the context.
        key_basis: What keys are kept along; None keeps them as they are.
        value_basis: As `key_basis`.
    """

    share: float = 1.0
    policy: str = "snapkv"
    sinks: int = 4
    window: int = 32
    block: int = 512
    pool: int = 7
    key_bits: int = 16
    value_bits: int = 16
    group: int = 32
    recent: int = 32
    key_basis: Basis | None = None
    value_basis: Basis | None = None

    def sizes(self, tokens: int) -> Sizes:
        """The lengths at a context of so many tokens."""
        interval = max(1, min(16, tokens // 64))
        return Sizes(
            budget=None if self.share == 1 else int(self.share * tokens + 1e-9),
            sinks=min(self.sinks, tokens // 64),
            window=max(1, min(self.window, tokens // 32)),
            block=max(interval, min(self.block, tokens // 8)),
            interval=interval,
            recent=min(self.recent, tokens // 32),
            group=max(_LEAST_GROUP, 1 << max(0, min(self.group, tokens // 16).bit_length() - 1)),
        )


def continuation_start(tokens: int) -> int:
    """Where a text of so many tokens stops being a prompt and starts being generated, when candidates are compared on it."""
    return tokens // 2


def packed_bytes(heads: int, size: int, tokens: int, bits: int, group: int, *, by_channel: bool) -> int:
    """Bytes of packed keys (by channel, whole groups) or values (by token) of one sequence, scales and minima included."""
    tables = tokens // group * size if by_channel else tokens
    return heads * (tokens * size * bits // 8 + _TABLE_BYTES * tables)


def wide(numbers: Tensor) -> Tensor:
    """In float32 at least: 16 bits are too few for sums, counts and what is between two products."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def rounded(numbers: Tensor, bits: int, dim: int) -> Tensor:
    """The values that `bits`-bit codes between minimum and maximum along `dim` stand for, with fp16 scales and minima."""
    exact = wide(numbers)
    low, high = exact.amin(dim, keepdim=True), exact.amax(dim, keepdim=True)
    minimum = low.half().to(exact.dtype)
    scale = ((high - minimum) / ((1 << bits) - 1)).clamp_min(2.0**-14).half().to(exact.dtype)
    return ((exact - minimum) / scale).round_().clamp_(0, (1 << bits) - 1).mul_(scale).add_(minimum).to(numbers.dtype)


class KvState:
    """What a layer keeps, and what it knows of its use.

    Attributes:
        keys: [B, KV heads, n, D], those of packed tokens as their codes stand for them, or coordinates; None before the first token.
        values: As `keys`.
        packed: How many of the first tokens are packed.
        seen: Tokens that have arrived.
    """

    def __init__(self, plan: KvPlan, tokens: int) -> None:
        self.plan, self.sizes = plan, plan.sizes(tokens)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.packed = self.seen = 0
        self._fresh = 0  # generated tokens since the last round
        self._queries: Tensor | None = None  # last ones, [B, heads, window at most, D]
        self._mass: Tensor | None = None  # attention received, [B, KV heads, n], and by how many queries
        self._queried: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def stored_bytes(self) -> int:
        """Bytes of one sequence: 16-bit numbers, and packed ones with their scales."""
        if self.keys is None or self.values is None:
            return 0
        total = 0
        for kept, bits, by_channel in ((self.keys, self.plan.key_bits, True), (self.values, self.plan.value_bits, False)):
            _, heads, tokens, size = kept.shape
            packed = self.packed if bits < 16 else 0
            total += packed_bytes(heads, size, packed, bits, self.sizes.group, by_channel=by_channel) + 2 * heads * size * (tokens - packed)
        return total

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None) -> Tensor:
        """Attention of a prompt, block by block, [B, heads, T, D]; afterwards its keys and values are thinned and packed."""
        outputs = []
        for start in range(0, query.shape[2], self.sizes.block):
            part = slice(start, start + self.sizes.block)
            outputs.append(self._attend(query[:, :, part], key[:, :, part], value[:, :, part], scale, softcap))
            self._round()
        return torch.cat(outputs, 2)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None) -> Tensor:
        """The same for text that is generated: however it is cut into calls, rounds are the same."""
        outputs, start = [], 0
        while start < query.shape[2]:
            part = slice(start, min(query.shape[2], start + self.sizes.interval - self._fresh))
            outputs.append(self._attend(query[:, :, part], key[:, :, part], value[:, :, part], scale, softcap))
            self._fresh += part.stop - start
            start = part.stop
            if self._fresh == self.sizes.interval:
                self._round()
        return torch.cat(outputs, 2) if outputs else query[..., : value.shape[3]]

    def reorder(self, rows: Tensor) -> None:
        """Lets sequence i be what sequence `rows[i]` was (beam search)."""
        for name in ("keys", "values", "_queries", "_mass", "_queried"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        before, arriving = self.tokens, query.shape[2]
        key = key if self.plan.key_basis is None else self.plan.key_basis.coordinates(key)
        value = value if self.plan.value_basis is None else self.plan.value_basis.coordinates(value)
        self.keys = key if self.keys is None else torch.cat([self.keys, key], 2)
        self.values = value if self.values is None else torch.cat([self.values, value], 2)
        self.seen += arriving
        attention = seen_by(query, self._known_keys, scale, softcap, before)
        batch, heads, groups, _, tokens = attention.shape
        values = self.values if self.plan.value_basis is None else self.plan.value_basis.numbers(self.values)
        output = attention.to(values.dtype).view(batch, heads, groups * arriving, tokens) @ values
        if self.plan.policy == "h2o" and self.sizes.budget is not None:
            self._count(attention, before)
        elif self.plan.policy in ("snapkv", "tova") and self.sizes.budget is not None:
            queries = query if self._queries is None else torch.cat([self._queries, query], 2)
            self._queries = queries[:, :, -self.sizes.window :]
        self._scaling = scale, softcap
        return output.view(batch, heads * groups, arriving, -1)

    @property
    def _known_keys(self) -> Tensor:
        assert self.keys is not None
        return self.keys if self.plan.key_basis is None else self.plan.key_basis.numbers(self.keys)

    def _count(self, attention: Tensor, before: int) -> None:
        """Adds what each kept token received, and the queries that could see it."""
        mass, arriving = attention.sum((2, 3)), attention.shape[3]
        queried = torch.arange(arriving, 0, -1, device=mass.device, dtype=mass.dtype).expand(*mass.shape[:2], arriving)
        if self._mass is not None and self._queried is not None:
            mass[:, :, :before] += self._mass
            queried = torch.cat([self._queried + arriving, queried], 2)
        self._mass, self._queried = mass, queried

    @torch.no_grad()
    def _round(self) -> None:
        self._fresh = 0
        if self.sizes.rest is not None and self.tokens > self.sizes.rest:
            self._evict(self.sizes.rest)
            self.packed = 0  # groups are formed anew
        self._pack()

    def _evict(self, rest: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        sinks, window = self.sizes.sinks, self.sizes.window
        wanted = rest - sinks - window
        best = self._scores().topk(wanted, dim=2).indices.sort(2).values + sinks  # of the tokens between sinks and window
        shape = (*self.keys.shape[:2], -1)
        first = torch.arange(sinks, device=best.device).expand(*shape)
        last = torch.arange(self.tokens - window, self.tokens, device=best.device).expand(*shape)
        kept = torch.cat([first, best.expand(*shape), last], 2)
        self.keys = self.keys.gather(2, kept[..., None].expand(*kept.shape, self.keys.shape[3]))
        self.values = self.values.gather(2, kept[..., None].expand(*kept.shape, self.values.shape[3]))
        if self._mass is not None and self._queried is not None:
            self._mass, self._queried = self._mass.gather(2, kept), self._queried.gather(2, kept)

    def _scores(self) -> Tensor:
        """Of the tokens between sinks and window, [B, KV heads or 1, tokens]; larger is kept."""
        assert self.keys is not None
        between = slice(self.sizes.sinks, self.tokens - self.sizes.window)
        if self.plan.policy == "streaming":
            return torch.arange(float(between.stop - between.start), device=self.keys.device)[None, None]
        if self.plan.policy == "h2o":
            assert self._mass is not None
            assert self._queried is not None
            return (self._mass / self._queried)[:, :, between]
        assert self._queries is not None
        scale, softcap = self._scaling
        if self.plan.policy == "tova":
            attention = seen_by(self._queries[:, :, -1:], self._known_keys, scale, softcap, self.tokens - 1)
            return attention.mean((1, 2))[:, None, 0, between]
        attention = seen_by(self._queries, self._known_keys, scale, softcap, self.tokens - self._queries.shape[2])
        scores = attention.sum(3).mean(2)[:, :, : between.stop]
        pool = self.plan.pool
        return max_pool1d(scores, pool, 1, pool // 2)[:, :, between.start :] if pool > 1 else scores[:, :, between.start :]

    def _pack(self) -> None:
        packed = self.sizes.packed(self.tokens)
        new = slice(self.packed, packed)
        if packed <= self.packed or (self.plan.key_bits, self.plan.value_bits) == (16, 16):
            return
        assert self.keys is not None
        assert self.values is not None
        if self.plan.key_bits < 16:
            batch, heads, _, size = self.keys.shape
            keys = self.keys[:, :, new].reshape(batch, heads, -1, self.sizes.group, size)
            self.keys = self.keys.clone()
            self.keys[:, :, new] = rounded(keys, self.plan.key_bits, 3).flatten(2, 3)
        if self.plan.value_bits < 16:
            self.values = self.values.clone()
            self.values[:, :, new] = rounded(self.values[:, :, new], self.plan.value_bits, 3)
        self.packed = packed


def seen_by(query: Tensor, keys: Tensor, scale: float, softcap: float | None, before: int) -> Tensor:
    """The attention of the last queries, [B, KV heads, query heads of each, T, n]; query i sees the keys up to `before` + i.

    It is float32 at least, as kernels have it between the products.
    """
    batch, heads, arriving, size = query.shape
    kv_heads, tokens = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * arriving, size)
    logits = (wide(grouped) @ wide(keys).transpose(2, 3)).mul_(scale).view(batch, kv_heads, heads // kv_heads, arriving, tokens)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if arriving > 1:
        later = torch.ones(arriving, tokens - before, dtype=torch.bool, device=keys.device).triu_(1)
        logits[..., before:].masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """The layer of a transformers cache whose attention is under a plan."""

    is_sliding = False

    def __init__(self, plan: KvPlan, context: int) -> None:
        super().__init__()
        self.state = KvState(plan, context)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands both on to the attention, which knows the queries too."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states = key_states.view_as(key_states)
        key_states.autoeff_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, of which positions follow, not those that are kept."""
        return self.state.seen

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.reorder(beam_idx)


class KvCache(DynamicCache):  # type: ignore[misc]
    """The cache for `model.generate(past_key_values=…)` of a model with plans in force; layers without one keep everything.

    Args:
        model: A decoder; its plans are those of now.
        context: Tokens that budgets are shares of.
    """

    def __init__(self, model: nn.Module, context: int) -> None:
        super().__init__(config=model.config)
        for module, plan in plans_of(model):
            self.layers[module.layer_idx] = _Layer(plan, context)

    @property
    def states(self) -> list[KvState]:
        """Of the layers under a plan."""
        return [layer.state for layer in self.layers if isinstance(layer, _Layer)]


def plans_of(model: nn.Module) -> list[tuple[nn.Module, KvPlan]]:
    """The attention modules of a model that are under a plan."""
    return [(module, KvPlan(**_merged(module))) for module in model.modules() if vars(module).get("kv_parts")]


def plan_part(model: nn.Module, attention: str, name: str, part: dict[str, Any]) -> Callable[[], None]:
    """Puts a part of the plan of one attention in force.

    Args:
        model: A transformers model whose attention goes through `ALL_ATTENTION_FUNCTIONS`.
        attention: Module path.
        name: Of the part; parts of different names come and go in any order.
        part: Fields of `KvPlan`.

    Returns:
        A call that takes it back; without any part the module is as it was.
    """
    module = model.get_submodule(attention)
    _take(module)
    vars(module)["kv_parts"][name] = part

    def undo() -> None:
        del vars(module)["kv_parts"][name]
        _give_back(module)

    return undo


@contextmanager
def watched(model: nn.Module, attentions: Collection[str], watch: Callable[[str, Tensor], None], what: str = "kv_watch") -> Iterator[None]:
    """Shows `watch` the attention of every pass over whole texts: module path, and float [B, KV heads, query heads of each, T, T].

    With `kv_watch_keys` or `kv_watch_values` as `what` it is shown these instead, [B, KV heads, T, D].
    """
    modules = {name: model.get_submodule(name) for name in attentions}
    try:
        for name, module in modules.items():
            _take(module)
            vars(module)[what] = lambda seen, name=name: watch(name, seen)
        yield
    finally:
        for module in modules.values():
            vars(module).pop(what, None)
            _give_back(module)


def _take(module: nn.Module) -> None:
    """Lets a module attend through `_attention`: its configuration becomes one of its own."""
    known = vars(module)
    if "kv_config" not in known:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
        known["kv_parts"], known["kv_config"] = {}, module.config
        config: Any = copy.copy(module.config)
        vars(config)["_attn_implementation_internal"] = _NAME
        module.config = config


def _give_back(module: nn.Module) -> None:
    known = vars(module)
    if not known["kv_parts"] and not any(name.startswith("kv_watch") for name in known):
        module.config = known.pop("kv_config")
        del known["kv_parts"]


def _merged(module: nn.Module) -> dict[str, Any]:
    return {field: value for part in vars(module)["kv_parts"].values() for field, value in part.items()}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention under the module's plan, as transformers calls it: [B, T, heads, D]."""
    if attention_mask is not None and query.shape[2] > 1 and not sees_all(attention_mask):
        raise InputError("a cache under a budget takes prompts of one length; run prompts of different lengths one by one")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap")
    if (watch := vars(module).get("kv_watch")) is not None:
        watch(seen_by(query, key, scale, softcap, 0))
    for name, numbers in (("kv_watch_keys", key), ("kv_watch_values", value)):
        if (watch := vars(module).get(name)) is not None:
            watch(numbers)
    layer: _Layer | None = getattr(key, "autoeff_layer", None)
    plan = KvPlan(**_merged(module)) if layer is None else layer.state.plan
    state = KvState(plan, key.shape[2]) if layer is None else layer.state
    if layer is None:  # a whole text: the first part is the prompt
        start = max(1, continuation_start(key.shape[2]))
        prompt, rest = slice(0, start), slice(start, None)
        output = torch.cat(
            [
                state.prefill(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], scale, softcap),
                state.decode(query[:, :, rest], key[:, :, rest], value[:, :, rest], scale, softcap),
            ],
            2,
        )
    elif state.seen == 0:
        output = state.prefill(query, key, value, scale, softcap)
    else:
        output = state.decode(query, key, value, scale, softcap)
    return output.transpose(1, 2).contiguous(), None


def sees_all(mask: Tensor) -> bool:
    """Whether the last query of every sequence sees every token."""
    last = mask[..., -1, :]
    return bool(last.all()) if last.dtype == torch.bool else bool((last == 0).all())
