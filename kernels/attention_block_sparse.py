"""Causal attention of a whole prompt that looks only at chosen blocks of keys; grouped queries.

The T x T square is cut into blocks of `block` x `block` tokens. `pack` turns a mask of blocks into a list: for each (sequence, query head,
block of queries) the blocks of keys that it sees, in their order, and how many; blocks after the diagonal are left out. Inside the listed
blocks a query sees the tokens up to its own. A query that sees none gives 0.

On CUDA a program takes a block of queries and walks its list with an online softmax; time follows the number of listed blocks. Choosing
them is the caller's. On the CPU: torch's attention with the mask written out.

What is rounded to the 16-bit type: the probabilities, and the result. Sums and the softmax are float32.

Source: the walk over a list of key blocks, block-sparse FlashAttention (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from autoeff.kernels import tuned

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["Blocks", "attention", "flops", "hopper_cases", "launch", "moved_bytes", "pack", "reference"]

_LOG2_E = 1 / 0.6931471805599453


@dataclass(frozen=True)
class Blocks:
    """The blocks of keys that each block of queries sees, checked once.

    Attributes:
        index: int32 [B, heads, T / block rounded up, most listed]; past the count anything.
        count: int32 [B, heads, T / block rounded up].
        block: Tokens, a power of two, at least 16.

    Raises:
        ValueError: A shape, dtype, size or device that does not belong to the others.
    """

    index: Tensor
    count: Tensor
    block: int

    def __post_init__(self) -> None:
        index, count = self.index, self.count
        if self.block < 16 or self.block & self.block - 1:
            raise ValueError(f"block must be a power of two, at least 16: got {self.block}")
        if index.dtype != torch.int32 or index.dim() != 4 or not index.is_contiguous():
            raise ValueError(f"index must be contiguous torch.int32 of rank 4: got {index.dtype} {tuple(index.shape)}")
        if count.dtype != torch.int32 or count.shape != index.shape[:3] or count.device != index.device or not count.is_contiguous():
            raise ValueError(f"count must be contiguous torch.int32 {tuple(index.shape[:3])}: got {count.dtype} {tuple(count.shape)}")

    def mask(self) -> Tensor:
        """The listed ones as bool [B, heads, blocks, blocks]."""
        blocks, most = self.index.shape[2:]
        listed = torch.arange(most, device=self.index.device) < self.count[..., None]
        found = torch.zeros(*self.index.shape[:3], blocks + 1, dtype=torch.bool, device=self.index.device)
        return found.scatter_(3, torch.where(listed, self.index, blocks).long(), True)[..., :blocks]


def pack(mask: Tensor, block: int) -> Blocks:
    """The list of a mask bool [B, heads, blocks, blocks] (queries, keys); what lies after the diagonal is left out.

    Raises:
        ValueError: Another dtype or shape, or a size that is no power of two, at least 16.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2] != mask.shape[3]:
        raise ValueError(f"mask must be bool [B, heads, blocks, blocks]: got {mask.dtype} {tuple(mask.shape)}")
    mask = mask.tril()
    count = mask.sum(3)
    order = mask.to(torch.uint8).argsort(dim=3, descending=True, stable=True)
    return Blocks(order[..., : max(1, int(count.max()) if count.numel() else 1)].int().contiguous(), count.int(), block)


def moved_bytes(b: int, heads: int, kv_heads: int, tokens: int, d: int, blocks: Blocks) -> int:
    """Bytes that the operation reads and writes at the least: q, k, v and the result once, and the list."""
    listed = 4 * (int(blocks.count.sum()) + blocks.count.numel())
    return 2 * b * tokens * d * (2 * heads + 2 * kv_heads) + listed


def flops(tokens: int, d: int, blocks: Blocks) -> int:
    """Floating-point operations of both products, for the pairs of tokens that see each other."""
    listed, size = blocks.mask(), blocks.block
    edge = tokens - (listed.shape[2] - 1) * size  # of the last, shorter block
    of = torch.tensor([size] * (listed.shape[2] - 1) + [edge], device="cpu")  # also where CUDA is the default device
    pairs = of[:, None] * of[None, :]
    pairs[range(len(of)), range(len(of))] = of * (of + 1) // 2
    return 4 * d * int((listed.cpu() * pairs).sum())


def reference(q: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """The exact result, float64 [B, heads, T, D]."""
    tokens, groups, size = q.shape[2], q.shape[1] // keys.shape[1], blocks.block
    wide_keys, wide_values = (tensor.cpu().double().repeat_interleave(groups, 1) for tensor in (keys, values))
    logits = q.cpu().double() @ wide_keys.transpose(2, 3) * scale
    block_of = torch.arange(tokens) // size
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for b, head, row in product(*map(range, blocks.count.shape)):
        for column in blocks.index[b, head, row, : int(blocks.count[b, head, row])].tolist():
            seen[b, head] |= (block_of == row)[:, None] & (block_of == column)[None, :]
    seen &= torch.ones(tokens, tokens, dtype=torch.bool).tril()
    logits = logits.masked_fill(~seen, -torch.inf)
    weight = torch.exp(logits - logits.amax(3, keepdim=True).nan_to_num(neginf=0.0))
    return weight / weight.sum(3, keepdim=True).clamp_min(1e-300) @ wide_values


def attention(q: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scale: float | None = None) -> Tensor:
    """The result [B, heads, T, D] in the dtype of q: on CUDA by Triton, on the CPU by torch's attention.

    Args:
        q: float16 or bfloat16 [B, heads, T, D].
        keys: [B, KV heads, T, D] in the dtype of q.
        values: As keys.
        blocks: For the heads of q.
        scale: Of the products; D^-0.5 if not given.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(q, keys, values, blocks)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if q.is_cuda:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        config = tuned.nearest("attention_block_sparse", q.shape[2], blocks.block, q.shape[3], q.device)
        launch(q.contiguous(), keys.contiguous(), values.contiguous(), blocks, scale, out, config)
        return out
    tokens = q.shape[2]
    seen = blocks.mask().repeat_interleave(blocks.block, 2).repeat_interleave(blocks.block, 3)[:, :, :tokens, :tokens].tril()
    # torch, too, answers 0 where nothing is seen
    return scaled_dot_product_attention(q, keys, values, seen, scale=scale, enable_gqa=True)


def launch(q: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scale: float, out: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernel into `out` [B, heads, T, D]; all tensors contiguous.

    Raises:
        ValueError: As in `attention`.
        RuntimeError: Triton is not installed.
    """
    _check(q, keys, values, blocks)
    strided = not all(tensor.is_contiguous() for tensor in (q, keys, values, out))
    if out.shape != q.shape or out.dtype != q.dtype or strided:
        raise ValueError(f"q, keys, values and out must be contiguous, out {q.dtype} {tuple(q.shape)}: got {out.dtype} {tuple(out.shape)}")
    if triton is None:
        raise RuntimeError("block-sparse attention on a GPU needs Triton, which is not installed: pip install 'triton>=3.6'")
    if not out.numel():
        return
    kernel, grid, arguments, options = _arguments(q, keys, values, blocks, scale, out, config)
    with torch.cuda.device(out.get_device()):  # on the CPU (-1) it does nothing
        kernel[grid](*arguments, **options)


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every dtype x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""
    for config, dtype in product(tuned.configurations("attention_block_sparse"), (torch.float16, torch.bfloat16)):
        tokens, block, d = config["m"], config["n"], config["k"]
        q, keys = (torch.empty(1, heads, tokens, d, dtype=dtype, device="meta") for heads in (32, 8))
        index, count = (
            torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, 32, tokens // block, 8), (1, 32, tokens // block))
        )
        case = _arguments(q, keys, keys, Blocks(index, count, block), 1.0, q, config)
        yield "attention_block_sparse", f"{dtype}, blocks of {block}; {tuned.label(config)}", *case, block >= 64


def _check(q: Tensor, keys: Tensor, values: Tensor, blocks: Blocks) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or q.dim() != 4 or keys.dim() != 4:
        raise ValueError(f"q and keys must be float16 or bfloat16 of rank 4: got {q.dtype} {tuple(q.shape)}, {tuple(keys.shape)}")
    b, heads, tokens, d = q.shape
    if (keys.shape[0], *keys.shape[2:]) != (b, tokens, d) or heads % max(1, keys.shape[1]) or values.shape != keys.shape:
        raise ValueError(
            f"keys and values must be [{b}, divisor of {heads}, {tokens}, {d}]: got {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is: got {tensor.dtype} on {tensor.device}")
    expected = (b, heads, -(-tokens // blocks.block))
    if tuple(blocks.count.shape) != expected or blocks.count.device != q.device:
        raise ValueError(f"blocks must be listed for {expected} on {q.device}: got {tuple(blocks.count.shape)} on {blocks.count.device}")


def _arguments(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scale: float, out: Tensor, config: Mapping[str, Any]
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    b, heads, tokens, d = q.shape
    arguments = (q, keys, values, blocks.index, blocks.count, out, scale * _LOG2_E, heads, tokens, d, blocks.index.shape[3])
    # blocks of more than 64 keys are taken in pieces: the scores of a tile stay in registers
    constants = {
        "GROUPS": heads // keys.shape[1], "SIZE": blocks.block, "BLOCK_L": min(blocks.block, 64),
        "BLOCK_D": max(16, triton.next_power_of_2(d)), "num_warps": config["warps"], "num_stages": config["stages"],
    }  # fmt: skip
    return _prefill_kernel, (blocks.count.shape[2], b * heads), arguments, constants


if triton is not None:

    @triton.jit
    def _prefill_kernel(  # type: ignore[no-untyped-def]
        q, keys, values, index, count, out, scale, heads, tokens, d, most,
        GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        PIECES: tl.constexpr = SIZE // BLOCK_L
        dtype: tl.constexpr = q.dtype.element_ty
        # the last blocks of a causal prompt have the most to do: they begin first
        of = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1).to(tl.int64)
        shared = head // heads * (heads // GROUPS) + head % heads // GROUPS
        query, column = of * SIZE + tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
        at_q = (head * tokens + query)[:, None] * d + column[None, :]
        inside_q = (query < tokens)[:, None] & (column < d)[None, :]
        asked = tl.load(q + at_q, mask=inside_q, other=0.0)
        row = head * tl.num_programs(0) + of
        total = tl.zeros((SIZE, BLOCK_D), tl.float32)
        top = tl.full((SIZE,), -float("inf"), tl.float32)
        mass = tl.zeros((SIZE,), tl.float32)
        for piece in range(tl.load(count + row) * PIECES):
            block = tl.load(index + row * most + piece // PIECES)
            token = block * SIZE + piece % PIECES * BLOCK_L + tl.arange(0, BLOCK_L)
            at = (shared * tokens + token)[:, None] * d + column[None, :]
            inside = (token < tokens)[:, None] & (column < d)[None, :]
            score = tl.dot(asked, tl.trans(tl.load(keys + at, mask=inside, other=0.0))) * scale
            score = tl.where((token[None, :] <= query[:, None]) & (token < tokens)[None, :], score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            # a query may see nothing yet, and -inf - -inf is NaN
            base = tl.where(higher == -float("inf"), 0.0, higher)
            weight = tl.exp2(score - base[:, None])
            fade = tl.exp2(top - base)
            mass = mass * fade + tl.sum(weight, 1)
            total = tl.dot(weight.to(dtype), tl.load(values + at, mask=inside, other=0.0), total * fade[:, None])
            top = higher
        result = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
        tl.store(out + at_q, result.to(dtype), mask=inside_q)
