"""Block-sparse prefill against float64 with the same list of blocks.

Limits (relative Frobenius error; twice that for the worst query): probabilities and the result are rounded once each, by u / sqrt(3) on
average, u = 2^-11 (fp16) or 2^-8 (bf16): below 1e-3 and 6e-3.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from autoeff.kernels import tuned
from autoeff.kernels.attention_block_sparse import Blocks, attention, flops, launch, moved_bytes, pack, reference

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
CONFIG: dict[str, Any] = {"kernel": "walk", "warps": 4, "stages": 2}
# sequences, query heads, KV heads, tokens, head size, block
SHAPES = [(1, 1, 1, 1, 16, 16), (2, 4, 2, 63, 24, 16), (1, 2, 1, 70, 32, 32)]


def _case(
    b: int, heads: int, kv: int, tokens: int, d: int, block: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor, Blocks]:
    """Some blocks of queries see nothing, some not the diagonal."""
    generator = torch.Generator().manual_seed(tokens)
    q, keys, values = (torch.randn(b, h, tokens, d, generator=generator) for h in (heads, kv, kv))
    blocks = -(-tokens // block)
    mask = torch.rand(b, heads, blocks, blocks, generator=generator) < 0.6
    if blocks > 1:
        mask[:, 0, 1] = False
    mask[:, :, -1, 0] = True
    return q.to(dtype), keys.to(dtype), values.to(dtype), pack(mask, block)


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    found, exact = found.cpu().double().flatten(0, 2), exact.flatten(0, 2)
    assert found.isfinite().all()
    empty = exact.norm(dim=1) == 0
    assert torch.equal(found[empty], exact[empty])
    assert float((found - exact).norm() / exact.norm()) <= limit
    worst = (found - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)
    assert float(worst.max()) <= 2 * limit


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path_gives_the_exact_result(shape: Any, dtype: torch.dtype) -> None:
    q, keys, values, blocks = _case(*shape, dtype)
    _assert_near(attention(q, keys, values, blocks), reference(q, keys, values, blocks, q.shape[3] ** -0.5), LIMIT[dtype])


def test_with_every_block_it_is_causal_attention() -> None:
    q, keys, values, _ = _case(*SHAPES[1])
    blocks = pack(torch.ones(2, 4, 4, 4, dtype=torch.bool), 16)
    exact = scaled_dot_product_attention(q.double(), keys.double(), values.double(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference(q, keys, values, blocks, 24**-0.5), exact)
    assert flops(63, 24, blocks) == 4 * 24 * 2 * 4 * 63 * 64 // 2


def test_list_is_that_of_the_mask_up_to_the_diagonal() -> None:
    mask = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    blocks = pack(mask, 16)
    assert torch.equal(blocks.mask(), mask.tril())
    assert int(blocks.count.max()) == blocks.index.shape[3]
    assert all(
        (row[1:] > row[:-1]).all() for rows, counts in zip(blocks.index[0], blocks.count[0], strict=True)
        for row in (r[:c] for r, c in zip(rows, counts.tolist(), strict=True))
    )  # fmt: skip


def test_bytes_and_operations() -> None:
    q, keys, values, blocks = _case(1, 2, 1, 64, 16, 16)
    stored = [q, keys, values, attention(q, keys, values, blocks), blocks.count]
    assert moved_bytes(1, 2, 1, 64, 16, blocks) == sum(tensor.nbytes for tensor in stored) + 4 * int(blocks.count.sum())
    seen = blocks.mask().repeat_interleave(16, 2).repeat_interleave(16, 3).tril()
    with torch.device("meta"):  # where the operands of a benchmark are made is not where pairs are counted
        assert flops(64, 16, blocks) == 4 * 16 * int(seen.sum())


def test_operands_that_do_not_belong_together_are_refused() -> None:
    q, keys, values, blocks = _case(*SHAPES[1])
    with pytest.raises(ValueError, match=r"keys and values must be \[2, divisor of 4, 63, 24\]"):
        attention(q, keys[:, :, :9], values, blocks)
    with pytest.raises(ValueError, match="values must be torch.float16 on cpu as q is: got torch.bfloat16"):
        attention(q, keys, values.bfloat16(), blocks)
    with pytest.raises(ValueError, match=r"blocks must be listed for \(2, 4, 4\) on cpu: got \(2, 4, 3\)"):
        attention(q, keys, values, pack(torch.ones(2, 4, 3, 3, dtype=torch.bool), 16))
    with pytest.raises(ValueError, match="block must be a power of two, at least 16: got 24"):
        pack(torch.ones(1, 1, 2, 2, dtype=torch.bool), 24)
    with pytest.raises(ValueError, match="mask must be bool"):
        pack(torch.ones(1, 1, 2, 2), 16)
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(q, keys, values, blocks, 1.0, torch.empty(2, 4, 63, 25).half(), CONFIG)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1, 150, 16, 128)], ids=str)
def test_interpreted_kernel_gives_the_exact_result(shape: Any) -> None:
    q, keys, values, blocks = _case(*shape)
    out = torch.full_like(q, torch.nan)
    launch(q, keys, values, blocks, q.shape[3] ** -0.5, out, CONFIG)
    _assert_near(out, reference(q, keys, values, blocks, q.shape[3] ** -0.5), LIMIT[torch.float16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 2, 700, 128, 64), (1, 4, 4, 1000, 128, 128)], ids=str)
def test_kernel_gives_the_exact_result(cuda: torch.device, shape: Any, dtype: torch.dtype) -> None:
    q, keys, values, blocks = _case(*shape, dtype)
    exact = reference(q, keys, values, blocks, q.shape[3] ** -0.5)
    moved = Blocks(blocks.index.to(cuda), blocks.count.to(cuda), blocks.block)
    q, keys, values = q.to(cuda), keys.to(cuda), values.to(cuda)
    _assert_near(attention(q, keys, values, moved), exact, LIMIT[dtype])
    out = torch.full_like(q, torch.nan)
    launch(q, keys, values, moved, q.shape[3] ** -0.5, out, tuned.nearest("attention_block_sparse", *shape[3:4], shape[5], shape[4], cuda))
    _assert_near(out, exact, LIMIT[dtype])
