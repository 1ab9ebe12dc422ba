"""Experts against float64, token by token, and routing against the base models' own modules.

Limits (relative Frobenius error; twice that for the worst token): silu(gate) * up and the result are rounded once each, gate and up too on
the torch path, by u / sqrt(3) on average, u = 2^-11 (fp16) or 2^-8 (bf16); packed weights as in test_linear_wq, twice, through a product
that doubles the relative error: 1e-3 and 6e-3, and twice that for packed experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import dequantize_wq, tuned
from autoeff.kernels.linear_wq import Weight
from autoeff.kernels.moe import Experts, experts, flops, launch, moved_bytes, plan, reference, route, touched

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
CONFIG: dict[str, Any] = {"kernel": "grouped", "block_n": 32, "block_m": 16, "block_k": 32, "warps": 4, "stages": 2}
# tokens, experts, chosen, hidden, FFN
SHAPES = [(1, 4, 2, 16, 8), (5, 8, 3, 40, 33), (19, 3, 1, 33, 24)]


def _packed(weight: Tensor, bits: int, group: int) -> Weight:
    rows = weight.reshape(-1, weight.shape[2])
    (n, k), groups = rows.shape, -(-rows.shape[1] // group)
    low = torch.full((n, groups), float(rows.min())).half()
    scale = torch.full((n, groups), (float(rows.max()) - float(rows.min())) / ((1 << bits) - 1)).half()
    codes = ((rows - low[0, 0].float()) / scale[0, 0].float()).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    assert k == weight.shape[2]
    return Weight(dequantize_wq.pack(codes, bits), scale, low, bits, k, group)


def _case(
    m: int, count: int, top_k: int, hidden: int, ffn: int, dtype: torch.dtype, bits: int = 16
) -> tuple[Tensor, Experts, Tensor, Tensor]:
    """The last expert is never chosen; all tokens of the first shape choose the same."""
    generator = torch.Generator().manual_seed(m)
    gate_up, down, x, logits = (
        torch.randn(shape, generator=generator) for shape in ((count, 2 * ffn, hidden), (count, hidden, ffn), (m, hidden), (m, count))
    )
    gate_up, down = gate_up / hidden**0.5, down / ffn**0.5
    logits[:, -1] = -9
    chosen, share = route(logits, top_k, True)
    if bits == 16:
        return x.to(dtype), Experts(gate_up.to(dtype), down.to(dtype), count), chosen, share
    return x.to(dtype), Experts(_packed(gate_up, bits, 32), _packed(down, bits, 16), count), chosen, share


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


def test_routing_is_that_of_the_base_models() -> None:
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    routers: list[tuple[Any, bool, bool]] = [
        (MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=6, num_experts_per_tok=3)), True, False),
        (OlmoeTopKRouter(OlmoeConfig(hidden_size=16, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False)), False, True),
        (Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=16, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True)), True, True),
    ]
    for router, renormalise, rounded in routers:
        torch.manual_seed(0)
        router.weight.data.normal_()
        router.to(torch.bfloat16)
        with torch.no_grad():
            logits, share, chosen = router(torch.randn(20, 16).bfloat16())
        found, weights = route(logits, 3, renormalise, rounded)
        assert torch.equal(found.long(), chosen)
        assert torch.equal(weights, share.float())


def test_top_k_beyond_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k must be in 1 .. 4: got 5"):
        route(torch.zeros(1, 4), 5, True)


@pytest.mark.parametrize(("m", "count", "top_k", "block"), [(1, 8, 2, 16), (50, 7, 3, 4), (3, 100, 2, 16), (64, 1, 1, 16)])
def test_plan_lists_every_pair_once_in_tiles_of_one_expert(m: int, count: int, top_k: int, block: int) -> None:
    generator = torch.Generator().manual_seed(m)
    chosen = torch.rand(m, count, generator=generator).argsort(1)[:, :top_k].int()
    laid = plan(chosen, count, block)
    tiles = laid.pairs.view(-1, block)
    assert sorted(laid.pairs[laid.pairs < m * top_k].tolist()) == list(range(m * top_k))
    for pairs, expert in zip(tiles, laid.expert.tolist(), strict=True):
        there = pairs[pairs < m * top_k].long()
        assert (expert == count) == (there.numel() == 0)
        assert bool((chosen.reshape(-1)[there] == expert).all())


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path_gives_the_exact_result(shape: Any, bits: int, dtype: torch.dtype) -> None:
    x, weights, chosen, share = _case(*shape, dtype, bits)
    _assert_near(experts(x, weights, chosen, share), reference(x, weights, chosen, share), LIMIT[dtype] * (1 if bits == 16 else 2))


def test_result_is_that_of_a_base_model() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 9, 16).half()
    weights = Experts(block.experts.gate_up_proj.data.half(), block.experts.down_proj.data.half(), 6)
    block.experts.gate_up_proj.data, block.experts.down_proj.data = weights.gate_up.double(), weights.down.double()  # type: ignore[union-attr]
    with torch.no_grad():
        logits, _, _ = block.gate(x[0].double())
        exact = block(x.double())[0]
    chosen, share = route(logits, 2, True)
    torch.testing.assert_close(reference(x[0], weights, chosen, share), exact, rtol=1e-5, atol=1e-5)  # routing weights are float32
    _assert_near(experts(x[0], weights, chosen, share), exact, LIMIT[torch.float16])


def test_bytes_and_operations() -> None:
    x, weights, chosen, share = _case(5, 4, 2, 32, 64, torch.float16)
    assert isinstance(weights.gate_up, Tensor)
    assert isinstance(weights.down, Tensor)
    stored = [weights.gate_up, weights.down, x, experts(x, weights, chosen, share)]
    assert moved_bytes(5, 32, 64, 4) == sum(tensor.nbytes for tensor in stored)
    _, packed, _, _ = _case(5, 4, 2, 32, 64, torch.float16, 3)
    tensors = [
        t for w in (packed.gate_up, packed.down) if isinstance(w, Weight) for t in (*w.planes.values(), w.scale, w.minimum) if t is not None
    ]
    assert (
        abs(moved_bytes(5, 32, 64, 4, 3, 32) - sum(t.nbytes for t in tensors) - 2 * x.nbytes) == 4 * 32 * 2 * 4
    )  # the groups of down are half as long
    assert flops(5, 32, 64, 2) == 2 * 5 * 2 * (128 * 32 + 32 * 64)
    assert touched(1, 8, 2) == pytest.approx(2)
    assert touched(10_000, 8, 2) == pytest.approx(8)


def test_operands_that_do_not_belong_together_are_refused() -> None:
    x, weights, chosen, share = _case(*SHAPES[0], torch.float16)
    with pytest.raises(ValueError, match=r"x must be torch.float16 \[M, 16\] on cpu: got torch.bfloat16"):
        experts(x.bfloat16(), weights, chosen, share)
    with pytest.raises(ValueError, match=r"chosen must be torch.int32 \[1, top_k\]"):
        experts(x, weights, chosen.long(), share)
    with pytest.raises(ValueError, match=r"share must be torch.float32 \(1, 2\)"):
        experts(x, weights, chosen, share[:, :1])
    with pytest.raises(ValueError, match="do not belong together"):
        Experts(torch.ones(4, 16, 16).half(), torch.ones(4, 16, 9).half(), 4)
    with pytest.raises(ValueError, match="y must be contiguous"):
        launch(x, weights, chosen, share, x.bfloat16(), CONFIG)


@pytest.mark.interpreted
@pytest.mark.parametrize("bits", [16, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_give_the_exact_result(shape: Any, bits: int) -> None:
    x, weights, chosen, share = _case(*shape, torch.float16, bits)
    y = torch.full_like(x, torch.nan)
    launch(x, weights, chosen, share, y, CONFIG)
    _assert_near(y, reference(x, weights, chosen, share), LIMIT[torch.float16] * (1 if bits == 16 else 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", [16, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 8, 2, 512, 384), (600, 16, 4, 256, 130)], ids=str)
def test_kernels_give_the_exact_result(cuda: torch.device, shape: Any, bits: int, dtype: torch.dtype) -> None:
    x, weights, chosen, share = _case(*shape, dtype, bits)
    exact = reference(x, weights, chosen, share)

    def moved(weight: Tensor | Weight) -> Tensor | Weight:
        if isinstance(weight, Tensor):
            return weight.to(cuda)
        assert weight.minimum is not None
        planes = {name: plane.to(cuda) for name, plane in weight.planes.items()}
        return Weight(planes, weight.scale.to(cuda), weight.minimum.to(cuda), weight.bits, weight.k, weight.group)

    there = Experts(moved(weights.gate_up), moved(weights.down), weights.count)
    limit = LIMIT[dtype] * (1 if bits == 16 else 2)
    _assert_near(experts(x.to(cuda), there, chosen.to(cuda), share.to(cuda)), exact, limit)
    runs = []
    for _ in range(2):
        y = torch.full_like(x, torch.nan, device=cuda)
        config = tuned.nearest("moe" if bits == 16 else "moe_wq", 32, 2 * weights.ffn, weights.hidden, cuda)
        launch(x.to(cuda), there, chosen.to(cuda), share.to(cuda), y, config)
        runs.append(y)
    _assert_near(runs[0], exact, limit)
    assert torch.equal(*runs)
