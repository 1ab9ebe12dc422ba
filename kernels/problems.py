"""Operands of every operation at given sizes, and who may solve them: ours, the 16-bit path, and what a user would pick instead.

`bench` times the contestants of a problem, `tune` its configurations. Sizes `m`, `n`, `k` mean what they mean in `tuning/default.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import scaled_dot_product_attention, silu

from autoeff.kernels import (
    attention_block_sparse,
    attention_decode,
    dequantize_wq,
    ffn_sparse,
    kv_evict,
    linear_24,
    linear_block_sparse,
    linear_lora,
    linear_lowrank,
    linear_w8a8,
    linear_wq,
    moe,
)

__all__ = ["OPS", "Problem", "problems"]

Call = Callable[[], Tensor]

GROUP = 64
"""Inputs that share a scale, in the low-bit weights."""
EXPERTS, TOP_K = 8, 2
DENSITY = 0.25
"""Of block-sparse weights and masks."""
SKIPPED = 0.5
"""Channels that the sparse FFN skips."""
RANK = 16
"""Of the adapters."""
WINDOW = 32


@dataclass(frozen=True)
class Problem:
    """One operation on one set of operands.

    Attributes:
        op: As in `tuning/default.json`.
        variant: What distinguishes problems of the same sizes.
        moved_bytes, flops: Of the operation, at the least.
        ours: The public function.
        tuned: The kernels with a given configuration; its result belongs to the caller until the next call.
        dense: Paths in 16 bits, and on the CPU in float32, by name; the first one is what the others are compared with.
        others: What a user would pick instead, by name; each returns a call, or fails where it is not installed or does not fit.
    """

    op: str
    variant: str
    moved_bytes: int
    flops: int
    ours: Call
    tuned: Callable[[Mapping[str, Any]], Tensor]
    dense: Mapping[str, Call]
    others: Mapping[str, Callable[[], Call]] = field(default_factory=dict)


def problems(op: str, m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, heads: int = 4) -> list[Problem]:
    """The problems of an operation at these sizes, with random operands on `device`.

    Args:
        op: One of `OPS`.
        m: As in `tuning/default.json`.
        n: Likewise.
        k: Likewise.
        device: CPU or CUDA.
        dtype: float16 or bfloat16, of the activations.
        heads: Query heads of a KV head, for attention.

    Raises:
        ValueError: Another operation.
    """
    if op not in OPS:
        raise ValueError(f"no operation {op!r}; allowed: {', '.join(OPS)}")
    torch.manual_seed(0)
    with torch.device(device):
        return list(OPS[op](m, n, k, dtype, heads))


def _dense(x: Tensor, weight: Tensor) -> dict[str, Call]:
    found = {f"dense {_short(x.dtype)}": lambda: dense_linear(x, weight)}
    if not x.is_cuda:  # what is fastest there
        wide, wide_weight = x.float(), weight.float()
        found["dense fp32"] = lambda: dense_linear(wide, wide_weight)
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def _packed(n: int, k: int, bits: int) -> linear_wq.Weight:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scale = (torch.rand(n, -(-k // GROUP)) * 0.02 + 0.01).half()
    return linear_wq.Weight(dequantize_wq.pack(codes, bits), scale, (scale.float() * (0.5 - 2 ** (bits - 1))).half(), bits, k, GROUP)


def _linear_wq(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    x, dense = torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    y = torch.empty(m, n, dtype=dtype)
    for bits in dequantize_wq.PLANES:
        weight = _packed(n, k, bits)
        # above a few rows the packed CPU kernel loses to decoding
        packed: Any = linear_wq.CpuWeight(weight) if not x.is_cuda and m <= 8 and dtype == torch.bfloat16 else weight

        def tuned(config: Mapping[str, Any], weight: linear_wq.Weight = weight) -> Tensor:
            if config["kernel"] == "dequantize":
                return dense_linear(x, weight.dense(dtype))
            linear_wq.launch(x, weight, None, y, config)
            return y

        others: dict[str, Callable[[], Call]] = {}
        if x.is_cuda and bits == 4:
            others = {"_weight_int4pack_mm": lambda: _int4pack(x, n, k), "torchao int4": lambda: _torchao(x, dense, 4)}
        elif x.is_cuda and bits == 8:
            others = {"torchao int8": lambda: _torchao(x, dense, 8), "GemLite A16W8": lambda: _gemlite(x, dense)}
        yield Problem(
            "linear_wq", f"{bits} bit", linear_wq.moved_bytes(m, n, k, bits, GROUP, False), linear_wq.flops(m, n, k),
            partial(linear_wq.linear, x, packed), tuned, _dense(x, dense), others,
        )  # fmt: skip


def _int4pack(x: Tensor, n: int, k: int) -> Call:
    fields = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=x.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(fields, 8)
    table = (torch.rand(k // GROUP, n, 2, device=x.device) * 0.02).bfloat16()
    half = x.bfloat16()
    return lambda: torch._weight_int4pack_mm(half, packed, GROUP, table)


def _torchao(x: Tensor, weight: Tensor, bits: int) -> Call:
    quantization: Any = import_module("torchao.quantization")
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=x.device, dtype=x.dtype)
    module.weight.data.copy_(weight)
    config = quantization.Int4WeightOnlyConfig(group_size=GROUP) if bits == 4 else quantization.Int8WeightOnlyConfig()
    quantization.quantize_(module, config)
    return lambda: module(x)


def _gemlite(x: Tensor, weight: Tensor) -> Call:
    helper: Any = import_module("gemlite.helper")
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=x.device, dtype=x.dtype)
    module.weight.data.copy_(weight)
    packed = helper.A16W8_INT8(device=str(x.device), dtype=x.dtype).from_linear(module)
    return lambda: packed(x)


def _linear_w8a8(form: torch.dtype, m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[Problem]:
    x, dense = torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    weight, y = linear_w8a8.pack(dense, form), torch.empty(m, n, dtype=dtype)
    codes, scale = linear_w8a8.quantize(x, form)

    def tuned(config: Mapping[str, Any]) -> Tensor:
        linear_w8a8.launch(codes, scale, weight, None, y, config)
        return y

    def scaled() -> Call:
        by_row, by_token = weight.scale[None], scale[:, None]
        return lambda: torch._scaled_mm(codes, weight.codes.T, scale_a=by_token, scale_b=by_row, out_dtype=torch.bfloat16)

    # both without quantising the activations, which ours does
    others = (
        {"_int_mm, given codes": lambda: lambda: torch._int_mm(codes, weight.codes.T)}
        if form == torch.int8
        else {"_scaled_mm, given codes": scaled}
    )
    op = "linear_w8a8_int8" if form == torch.int8 else "linear_w8a8_fp8"
    yield Problem(
        op, "int8" if form == torch.int8 else "fp8", linear_w8a8.moved_bytes(m, n, k), linear_w8a8.flops(m, n, k),
        lambda: linear_w8a8.linear(x, weight), tuned, _dense(x, dense), others,
    )  # fmt: skip


def _linear_lowrank(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    rank = max(16, n * k // (n + k) // 2 // 16 * 16)  # half of the bytes of the dense weight
    x, v, u = (torch.randn(shape).to(dtype) for shape in ((m, k), (rank, k), (n, rank)))
    dense, y = torch.randn(n, k).to(dtype), torch.empty(m, n, dtype=dtype)

    def tuned(config: Mapping[str, Any]) -> Tensor:
        if config["kernel"] == "dense" or (config["kernel"] == "fused" and rank > linear_lowrank.MAX_RANK):
            return dense_linear(dense_linear(x, v), u)
        linear_lowrank.launch(x, v, u, None, y, config)
        return y

    yield Problem(
        "linear_lowrank", f"rank {rank}", linear_lowrank.moved_bytes(m, n, k, rank), linear_lowrank.flops(m, n, k, rank),
        lambda: linear_lowrank.linear(x, v, u), tuned, _dense(x, dense),
        {"two products": lambda: lambda: dense_linear(dense_linear(x, v), u)},
    )  # fmt: skip


def _linear_24(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    x, y = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype)
    sparse = torch.randn(n, k // 4, 4)
    sparse = (sparse * (sparse.abs().argsort(2).argsort(2) > 1)).view(n, k).to(dtype)
    weight = linear_24.pack(sparse)

    def tuned(config: Mapping[str, Any]) -> Tensor:
        if config["kernel"] == "dense":
            return dense_linear(x, weight.dense())
        linear_24.launch(x, weight, None, y, config)
        return y

    def semi() -> Call:
        packed = torch.sparse.to_sparse_semi_structured(sparse)
        return lambda: dense_linear(x, packed)

    yield Problem(
        "linear_24", "2:4", linear_24.moved_bytes(m, n, k), linear_24.flops(m, n, k), lambda: linear_24.linear(x, weight), tuned,
        _dense(x, sparse), {"torch semi-structured": semi} if x.is_cuda else {},
    )  # fmt: skip


def _linear_block_sparse(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    block = 64
    if n % block or k % block:
        return
    x, dense, y = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n, dtype=dtype)
    rows, columns = n // block, k // block
    order = torch.rand(rows, columns).argsort(1).argsort(1)
    mask = order < max(1, round(columns * DENSITY))  # as many in each row of blocks
    label = f"{float(mask.float().mean()):.0%} of blocks of {block}"
    weight = linear_block_sparse.pack(dense, mask)
    kept = int(mask.sum())

    def tuned(config: Mapping[str, Any]) -> Tensor:
        linear_block_sparse.launch(x, weight, None, y, config)
        return y

    yield Problem(
        "linear_block_sparse", label, linear_block_sparse.moved_bytes(m, n, k, kept, block, block),
        linear_block_sparse.flops(m, kept, block, block), lambda: linear_block_sparse.linear(x, weight), tuned, _dense(x, dense),
    )  # fmt: skip


def _linear_lora(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    x, dense, y = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n, dtype=dtype)
    count = min(m, 4)
    adapters = linear_lora.Adapters(torch.randn(count, RANK, k).to(dtype), torch.randn(count, n, RANK).to(dtype), torch.ones(count))
    of_row = (torch.arange(m) * count // m).int()  # sorted

    def tuned(config: Mapping[str, Any]) -> Tensor:
        if config["kernel"] == "fused":
            linear_lora.launch(x, dense, adapters, of_row, None, y, config)
            return y
        found = dense_linear(x, dense)
        linear_lora.launch(x, None, adapters, of_row, None, found, config)
        return found

    yield Problem(
        "linear_lora", f"rank {RANK}, adapters {count}", linear_lora.moved_bytes(m, n, k, RANK, count), linear_lora.flops(m, n, k, RANK),
        lambda: linear_lora.linear(x, dense, adapters, of_row), tuned, _dense(x, dense),
    )  # fmt: skip


def _moe(m: int, n: int, k: int, dtype: torch.dtype, bits: int) -> Iterator[Problem]:
    tokens, ffn = max(1, m * EXPERTS // TOP_K), n // 2
    x, y = torch.randn(tokens, k).to(dtype), torch.empty(tokens, k, dtype=dtype)
    gate_up, down = (torch.randn(EXPERTS, n, k) * k**-0.5).to(dtype), (torch.randn(EXPERTS, k, ffn) * ffn**-0.5).to(dtype)
    if bits == 16:
        weights = moe.Experts(gate_up, down, EXPERTS)
    else:
        weights = moe.Experts(_packed(EXPERTS * n, k, bits), _packed(EXPERTS * k, ffn, bits), EXPERTS)
    chosen, share = moe.route(torch.randn(tokens, EXPERTS), TOP_K, True)

    def tuned(config: Mapping[str, Any]) -> Tensor:
        moe.launch(x, weights, chosen, share, y, config)
        return y

    def looped() -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            gate, up = dense_linear(x[token], gate_up[expert]).chunk(2, 1)
            total.index_add_(0, token, dense_linear(silu(gate) * up, down[expert]) * share[token, choice, None].to(dtype))
        return total

    def grouped() -> Call:
        order = chosen.flatten().argsort(stable=True)
        source, ends = order // TOP_K, torch.bincount(chosen.flatten(), minlength=EXPERTS).cumsum(0).int()

        def call() -> Tensor:  # without the routing, which ours does
            gate, up = torch._grouped_mm(x[source], gate_up.transpose(1, 2), offs=ends).chunk(2, 1)
            found = torch._grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends) * share.flatten()[order, None].to(dtype)
            return torch.zeros_like(x).index_add_(0, source, found)

        return call

    touched = len(set(chosen.flatten().tolist()))
    moved, label = moe.moved_bytes(tokens, k, ffn, touched, bits, GROUP), f"{bits} bit, {EXPERTS} experts, top {TOP_K}, {tokens} tokens"
    yield Problem(
        "moe" if bits == 16 else "moe_wq", label, moved, moe.flops(tokens, k, ffn, TOP_K),
        lambda: moe.experts(x, weights, chosen, share), tuned,
        {f"loop over experts {_short(dtype)}": looped}, {"_grouped_mm, sorted": grouped},
    )  # fmt: skip


def _attention_decode(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    q, keys, values = torch.randn(1, m * heads, k).to(dtype), torch.randn(1, m, n, k).to(dtype), torch.randn(1, m, n, k).to(dtype)
    full, out, lengths = attention_decode.Cache(keys, values), torch.empty_like(q), torch.full((1, m), n, dtype=torch.int32)
    dense = {f"SDPA {_short(dtype)}": lambda: scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]}
    for bits in (16, *attention_decode.BITS):
        cache = full if bits == 16 else attention_decode.pack(full, bits, GROUP)

        def tuned(config: Mapping[str, Any], cache: Any = cache) -> Tensor:
            attention_decode.launch(q, cache, lengths, k**-0.5, None, None, out, config)
            return out

        moved = attention_decode.moved_bytes(m * n, 1, m * heads, k, bits, GROUP)
        yield Problem(
            "attention_decode", f"{bits} bit", moved, attention_decode.flops(m * n, heads, k),
            partial(attention_decode.attention, q, cache, lengths), tuned, dense,
        )  # fmt: skip


def _attention_block_sparse(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    kv, count = (8, -(-m // n)) if m >= 1024 else (2, -(-m // n))
    q, keys, values = (torch.randn(1, h, m, k).to(dtype) for h in (kv * heads, kv, kv))
    mask = torch.rand(1, kv * heads, count, count) < DENSITY
    mask |= torch.eye(count, dtype=torch.bool)
    blocks, out = attention_block_sparse.pack(mask, n), torch.empty_like(q)

    def tuned(config: Mapping[str, Any]) -> Tensor:
        attention_block_sparse.launch(q, keys, values, blocks, k**-0.5, out, config)
        return out

    def flex() -> Call:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        kept = blocks.mask()
        order = kept.to(torch.uint8).argsort(dim=3, descending=True, stable=True).int()
        inner = BlockMask.from_kv_blocks(kept.sum(3).int(), order, BLOCK_SIZE=n, mask_mod=lambda b, h, query, key: query >= key)
        run: Any = torch.compile(flex_attention)
        return lambda: run(q, keys, values, block_mask=inner, enable_gqa=True)

    yield Problem(
        "attention_block_sparse", f"{float(blocks.mask().sum() / mask.tril().numel() * 2):.0%} of causal blocks of {n}",
        attention_block_sparse.moved_bytes(1, kv * heads, kv, m, k, blocks), attention_block_sparse.flops(m, k, blocks),
        lambda: attention_block_sparse.attention(q, keys, values, blocks), tuned,
        {f"causal SDPA {_short(dtype)}": lambda: scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)},
        {"flex_attention": flex} if q.is_cuda else {},
    )  # fmt: skip


def _kv_evict(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    q, keys = torch.randn(1, m * heads, WINDOW, k).to(dtype), torch.randn(1, m, n, k).to(dtype)
    scores = torch.empty(1, m, n - WINDOW)
    later = torch.arange(n) > n - WINDOW + torch.arange(WINDOW)[:, None]

    def tuned(config: Mapping[str, Any]) -> Tensor:
        kv_evict.launch(q, keys, k**-0.5, scores, config)
        return scores

    def plain() -> Tensor:
        logits: Tensor = q.view(1, m, heads * WINDOW, k) @ keys.transpose(2, 3) * k**-0.5
        logits = logits.view(1, m, heads, WINDOW, n).masked_fill(later, -torch.inf)
        return logits.softmax(-1, dtype=torch.float32).sum(3).mean(2)[:, :, : n - WINDOW]

    yield Problem(
        "kv_evict", f"score, window {WINDOW}", kv_evict.moved_bytes(1, m * heads, m, n, WINDOW, k),
        kv_evict.flops(1, m * heads, n, WINDOW, k),
        lambda: kv_evict.score(q, keys, pool=1), tuned, {f"product and softmax {_short(dtype)}": plain},
    )  # fmt: skip


def _ffn_sparse(m: int, n: int, k: int, dtype: torch.dtype, heads: int) -> Iterator[Problem]:
    x, y = torch.randn(m, k).to(dtype), torch.empty(m, k, dtype=dtype)
    gate, up, down = (
        (torch.randn(n, k) * k**-0.5).to(dtype),
        (torch.randn(n, k) * k**-0.5).to(dtype),
        (torch.randn(k, n) * n**-0.5).to(dtype),
    )
    weights, gate_up = ffn_sparse.pack(gate, up, down), torch.cat([gate, up])
    first = float(x.float().abs().quantile(SKIPPED)) if x.numel() < 1 << 24 else 0.0
    both = dense_linear(x * (x.abs() > first), gate_up)
    middle = silu(both[:, :n]) * both[:, n:]
    second = float(middle.float().abs().flatten()[: 1 << 20].quantile(SKIPPED))
    kept = [int((value.abs() > limit).any(0).sum()) for value, limit in ((x, first), (middle, second))]

    def tuned(config: Mapping[str, Any]) -> Tensor:
        ffn_sparse.launch(x, weights, (first, second), y, config)
        return y

    def dense() -> Tensor:
        a, b = dense_linear(x, gate_up).chunk(2, 1)
        return dense_linear(silu(a) * b, down)

    yield Problem(
        "ffn_sparse", f"{kept[0]} of {k} and {kept[1]} of {n} channels", ffn_sparse.moved_bytes(m, k, n, *kept),
        ffn_sparse.flops(m, k, n, *kept),
        lambda: ffn_sparse.ffn(x, weights, (first, second)), tuned, {f"dense FFN {_short(dtype)}": dense},
    )  # fmt: skip


OPS: Mapping[str, Callable[[int, int, int, torch.dtype, int], Iterator[Problem]]] = {
    "attention_block_sparse": _attention_block_sparse,
    "attention_decode": _attention_decode,
    "ffn_sparse": _ffn_sparse,
    "kv_evict": _kv_evict,
    "linear_24": _linear_24,
    "linear_block_sparse": _linear_block_sparse,
    "linear_lora": _linear_lora,
    "linear_lowrank": _linear_lowrank,
    "linear_w8a8_fp8": lambda m, n, k, dtype, heads: _linear_w8a8(torch.float8_e4m3fn, m, n, k, dtype),
    "linear_w8a8_int8": lambda m, n, k, dtype, heads: _linear_w8a8(torch.int8, m, n, k, dtype),
    "linear_wq": _linear_wq,
    "moe": lambda m, n, k, dtype, heads: _moe(m, n, k, dtype, 16),
    "moe_wq": lambda m, n, k, dtype, heads: _moe(m, n, k, dtype, 4),
}
"""The problems of an operation by its name in `tuning/default.json`, and of nothing else."""
