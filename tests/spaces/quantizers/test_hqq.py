"""Half-quadratic quantization against round to nearest, from which it starts, and against a search over scales and shifts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoeff.spaces.quantizer import Codes, make_quantizer


def _values(found: Codes, bits: int, group_size: int) -> Tensor:
    codes = found.codes.double()
    scale, minimum = (
        None if t is None else t.double().repeat_interleave(group_size, 1)[:, : codes.shape[1]] for t in (found.scale, found.minimum)
    )
    assert scale is not None
    return (codes - 2 ** (bits - 1)) * scale if minimum is None else codes * scale + minimum


def _errors(name: str, weight: Tensor, bits: int, group_size: int, symmetric: bool, power: float = 1) -> Tensor:
    """Sums of |w - w'|^power by group, float64 [N, G]."""
    found = make_quantizer(name, group_size=group_size, symmetric=symmetric).codes(weight, bits)
    lost = (weight.double() - _values(found, bits, group_size)).abs().pow(power)
    return torch.nn.functional.pad(lost, (0, -lost.shape[1] % group_size)).reshape(len(lost), -1, group_size).sum(2)


def _heavy_tailed(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, k, 4, generator=generator)
    return (0.05 * normal[..., 0] / normal[..., 1:].square().mean(-1).sqrt()).half().float()  # Student's t with 3 degrees of freedom


@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 8, 63, 130, 341]),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from([8, 64]),
    st.booleans(),
    st.sampled_from([1e-6, 1e-3, 0.02, 1.0, 1000.0, 3e4]),
)
@settings(deadline=None, max_examples=100)
def test_no_group_is_worse_than_rounded_to_nearest(seed: int, k: int, bits: int, group_size: int, symmetric: bool, spread: float) -> None:
    weight = (spread * torch.randn(3, k, generator=torch.Generator().manual_seed(seed))).clamp(-65504, 65504).half().float()
    nearest, found = (_errors(name, weight, bits, group_size, symmetric) for name in ("rtn", "hqq"))
    # a residual is known to 2^-23 of the weight
    slack = group_size * 2.0**-22 * float(weight.abs().max())
    assert (found <= nearest * (1 + 1e-5) + slack).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_heavy_tailed_weights_lose_less(bits: int, symmetric: bool) -> None:
    nearest, found = (float(_errors(name, _heavy_tailed(32, 512), bits, 64, symmetric).sum()) for name in ("rtn", "hqq"))
    assert found < 0.97 * nearest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_most_of_what_the_best_grid_could_gain_in_squares_is_gained(bits: int) -> None:
    """Against every one of many scales and shifts."""
    weight = _heavy_tailed(24, 64, seed=bits)
    nearest, found = (_errors(name, weight, bits, 64, False, power=2)[:, 0] for name in ("rtn", "hqq"))
    start = make_quantizer("rtn", group_size=64, symmetric=False).codes(weight, bits)
    assert start.minimum is not None
    half = (2**bits - 1) / 2
    middle = start.minimum.double() + start.scale.double() * half
    best = nearest.clone()
    for share in torch.linspace(0.2, 1, 41):
        scale = share * start.scale.double()
        for shift in torch.linspace(-1, 1, 41):
            least = middle + (shift - half) * scale
            codes = ((weight.double() - least) / scale).round().clamp(0, 2**bits - 1)
            best = torch.minimum(best, (weight.double() - codes * scale - least).square().sum(1))
    assert float((nearest - found).sum()) > 0.8 * float((nearest - best).sum())


@pytest.mark.parametrize("masked", [False, True])
def test_weights_on_a_narrower_grid_are_found_with_an_outlier_beside_them(masked: bool) -> None:
    """Round to nearest spans the outlier; the fitted grid stays with the others, or does not see it where it is pruned."""
    weight = torch.cat([torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(64), torch.tensor([2.0])])[None]
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[0, -1] = not masked
    quantizer = make_quantizer("hqq", group_size=264, symmetric=False)
    back = quantizer.dequantize(quantizer.quantize(weight, 2, mask), 2, 257, mask=mask)
    assert float((back - weight)[0, :-1].abs().max()) < (1e-3 if masked else 0.1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_scaling_the_weights_scales_the_grid_and_changes_no_code(symmetric: bool) -> None:
    quantizer, weight = make_quantizer("hqq", group_size=64, symmetric=symmetric), _heavy_tailed(8, 192).clamp(-0.5, 0.5)
    plain, scaled = quantizer.codes(weight, 3), quantizer.codes(weight * 64, 3)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.scale * 64, scaled.scale)


def test_a_group_does_not_depend_on_the_others() -> None:
    quantizer, weight = make_quantizer("hqq", group_size=64, symmetric=False), _heavy_tailed(16, 256)
    whole, part = quantizer.codes(weight, 3), quantizer.codes(weight[5:6, 64:128], 3)
    assert torch.equal(whole.codes[5, 64:128], part.codes[0])
    assert whole.scale[5, 1] == part.scale[0, 0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, -1.0, 65504.0, -65504.0])
def test_constant_groups_keep_their_value(value: float, symmetric: bool) -> None:
    weight = torch.full((2, 20), value).half()
    for bits in (2, 4, 8):
        nearest, found = (make_quantizer(name, group_size=8, symmetric=symmetric) for name in ("rtn", "hqq"))
        expected = nearest.dequantize(nearest.quantize(weight, bits), bits, 20)
        lost, lost_at_most = ((weight - other).abs() for other in (found.dequantize(found.quantize(weight, bits), bits, 20), expected))
        assert (lost <= lost_at_most).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_largest_fp16_weights_do_not_overflow(symmetric: bool) -> None:
    weight = (65504 * (1 - torch.rand(16, 64, generator=torch.Generator().manual_seed(0)).pow(4))).half()
    quantizer = make_quantizer("hqq", group_size=64, symmetric=symmetric)
    for signed in (weight, -weight):
        assert all(quantizer.dequantize(quantizer.quantize(signed, bits), bits, 64).isfinite().all() for bits in (2, 3, 4, 8))
