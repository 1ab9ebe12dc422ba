"""The channel-skipping FFN against float64 with the same thresholds.

Limits (relative Frobenius error; twice that for the worst token): the inner activation is rounded once in the reference as well; where
float32 sums put it on the other side of a rounding or of a threshold it moves by a spacing or vanishes near the threshold. The thresholds
are therefore set in a gap of the inner activations. Otherwise gate, up and the result are rounded once each, by u / sqrt(3) on average,
u = 2^-11 (fp16) or 2^-8 (bf16): 1e-3 and 8e-3.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.kernels import tuned
from autoeff.kernels.ffn_sparse import MAX_ROWS, Ffn, ffn, flops, launch, moved_bytes, pack, reference

LIMIT = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
CONFIG: dict[str, Any] = {"kernel": "list", "block_n": 32, "block_c": 8, "splits": 2, "warps": 4, "stages": 2}
SHAPES = [(1, 8, 16), (1, 63, 100), (3, 40, 33), (4, 100, 24)]  # M, H, F


def _gap(values: Tensor, share: float) -> float:
    """The middle of the widest gap between magnitudes near this share of them."""
    sizes = values.abs().double().flatten().sort().values
    near = sizes[int(share * len(sizes) * 0.7) : max(2, int(share * len(sizes) * 1.3) + 1)]
    at = int((near[1:] - near[:-1]).argmax())
    return float(near[at : at + 2].mean())


def _case(m: int, hidden: int, inner: int, dtype: torch.dtype, share: float = 0.6) -> tuple[Tensor, Ffn, tuple[float, float]]:
    generator = torch.Generator().manual_seed(m + hidden)
    x, gate, up, down = (torch.randn(s, generator=generator) for s in ((m, hidden), (inner, hidden), (inner, hidden), (hidden, inner)))
    x, weights = x.to(dtype), pack((gate / hidden**0.5).to(dtype), (up / hidden**0.5).to(dtype), (down / inner**0.5).to(dtype))
    first = _gap(x, share)
    both = (x.double() * (x.double().abs() > first)) @ weights.gate_up.double()
    middle = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]
    return x, weights, (first, _gap(middle, share))


def _assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    away = found.cpu().double() - exact
    assert found.isfinite().all()
    assert float(away.norm() / exact.norm()) <= limit
    assert float((away.norm(dim=1) / exact.norm(dim=1).clamp_min(float(exact.norm()) / len(exact) ** 0.5)).max()) <= 2 * limit


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("shape", [*SHAPES, (7, 32, 48)], ids=str)
def test_torch_path_gives_the_exact_result(shape: Any, share: float, dtype: torch.dtype) -> None:
    x, weights, thresholds = _case(*shape, dtype, share)
    _assert_near(ffn(x, weights, thresholds), reference(x, weights, thresholds), LIMIT[dtype])


def test_reference_skips_what_is_small_and_nothing_else() -> None:
    x = torch.tensor([[0.5, -2.0, 1.0]]).half()
    weights = pack(torch.eye(3).half(), torch.ones(3, 3).half(), torch.eye(3).half())
    # kept: -2 and 1; up is their sum -1 everywhere, gate the numbers themselves
    inner = -torch.nn.functional.silu(torch.tensor([0.0, -2.0, 1.0]))
    torch.testing.assert_close(reference(x, weights, (0.5, 0.0))[0].float(), inner, rtol=1e-3, atol=0)
    assert reference(x, weights, (0.5, 0.3))[0].count_nonzero() == 1
    assert not ffn(x, weights, (9.0, 0.0)).any()


def test_bytes_and_operations() -> None:
    x, weights, _ = _case(2, 32, 48, torch.float16)
    assert moved_bytes(2, 32, 48, 32, 48) == sum(t.nbytes for t in (x, weights.gate_up, weights.down, ffn(x, weights, (0.0, 0.0))))
    assert moved_bytes(1, 32, 48, 16, 12) - moved_bytes(1, 32, 48, 0, 0) == weights.gate_up.nbytes // 2 + weights.down.nbytes // 4
    assert flops(2, 32, 48, 16, 12) == 2 * 2 * (16 * 96 + 12 * 32)


def test_operands_that_do_not_belong_together_are_refused() -> None:
    x, weights, _ = _case(1, 8, 16, torch.float16)
    with pytest.raises(ValueError, match=r"x must be torch.float16 \[M, 8\] on cpu: got torch.bfloat16"):
        ffn(x.bfloat16(), weights, (0.0, 0.0))
    with pytest.raises(ValueError, match="thresholds must be at least 0"):
        ffn(x, weights, (0.0, -1.0))
    with pytest.raises(ValueError, match=r"down must be contiguous torch.float16 \(16, 8\)"):
        Ffn(weights.gate_up, weights.down[:9].contiguous())
    with pytest.raises(ValueError, match="at most 4 tokens: got 5"):
        launch(x.expand(MAX_ROWS + 1, 8).contiguous(), weights, (0.0, 0.0), torch.empty(5, 8).half(), CONFIG)


@pytest.mark.interpreted
@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "splits": 5, "block_c": 4}], ids=["2 parts", "5 parts"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_give_the_exact_result(shape: Any, config: dict[str, Any]) -> None:
    x, weights, thresholds = _case(*shape, torch.float16)
    y = torch.full_like(x, torch.nan)
    launch(x, weights, thresholds, y, config)
    _assert_near(y, reference(x, weights, thresholds), LIMIT[torch.float16])


@pytest.mark.interpreted
def test_interpreted_kernels_give_zeros_where_nothing_is_kept() -> None:
    x, weights, _ = _case(1, 8, 16, torch.float16)
    y = torch.full_like(x, torch.nan)
    launch(x, weights, (99.0, 0.0), y, CONFIG)
    assert not y.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096, 1792), (2, 512, 1500)], ids=str)
def test_kernels_give_the_exact_result(cuda: torch.device, shape: Any, dtype: torch.dtype) -> None:
    x, weights, thresholds = _case(*shape, dtype)
    exact, moved = reference(x, weights, thresholds), Ffn(weights.gate_up.to(cuda), weights.down.to(cuda))
    _assert_near(ffn(x.to(cuda), moved, thresholds), exact, LIMIT[dtype])
    runs = []
    for _ in range(2):
        y = torch.full_like(x, torch.nan, device=cuda)
        launch(x.to(cuda), moved, thresholds, y, tuned.nearest("ffn_sparse", shape[0], shape[2], shape[1], cuda))
        runs.append(y)
    assert torch.equal(*runs)
