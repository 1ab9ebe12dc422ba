"""Round to nearest against brute force and its error bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.quantizer import Quantizer, make_quantizer

BITS = [2, 3, 4, 6, 8]
LARGEST = 65504.0
SMALLEST = 2.0**-24


def _rtn(group_size: int = 64, symmetric: bool = False) -> Quantizer:
    return make_quantizer("rtn", group_size=group_size, symmetric=symmetric)


def _per_weight(values: Tensor, group_size: int, k: int) -> Tensor:
    return values.double().repeat_interleave(group_size, dim=1)[:, :k]


def _values(packed: dict[str, Tensor], bits: int, group_size: int, k: int) -> Tensor:
    """Every value that a weight could take, float64 [N, K, 2^bits], by the definition of the format."""
    codes = torch.arange(1 << bits, dtype=torch.float64)
    scale = _per_weight(packed["scale"], group_size, k)[:, :, None]
    if "minimum" not in packed:
        return (codes - (1 << bits - 1)) * scale
    return codes * scale + _per_weight(packed["minimum"], group_size, k)[:, :, None]


def _half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding `values` to `dtype`, or a bf16 minimum to fp16, can change."""
    return torch.clamp(values.abs() * torch.finfo(dtype).eps / 2, min=SMALLEST / 2)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """16-bit weights of every magnitude that fp16 scales can hold, some rows constant, with few or many inputs."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n, k = draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 8, 9, 63, 64, 130]))
    center = draw(st.sampled_from([0.0, 0.0, 1.0, -1000.0, 60000.0]))
    spread = draw(st.sampled_from([0.0, 1e-7, 1e-4, 0.02, 1.0, 3e4]))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    weight = center + spread * torch.randn(n, k, generator=generator)
    return weight.clamp(-LARGEST, LARGEST).to(dtype).clamp(-LARGEST, LARGEST)


@given(weights(), st.sampled_from(BITS), st.sampled_from([8, 24, 64]), st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_weight_is_within_half_a_step_of_its_value(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    """|w - w'| <= scale / 2, plus the rounding of w' to 16 bits, plus 2^-20 of the range for the float32 arithmetic in between."""
    quantizer, k = _rtn(group_size, symmetric), weight.shape[1]
    packed = quantizer.quantize(weight, bits)
    back = quantizer.dequantize(packed, bits, k, weight.dtype).double()
    scale = _per_weight(packed["scale"], group_size, k)
    bound = scale / 2 + _half_ulp(back, weight.dtype) + 2.0**-20 * (weight.double().abs().max() + (scale * 2**bits))
    assert back.isfinite().all()
    assert ((weight.double() - back).abs() <= bound).all()


@given(weights(), st.sampled_from(BITS), st.sampled_from([8, 24, 64]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_nearest_of_the_stored_values_is_taken(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> None:
    quantizer, k = _rtn(group_size, symmetric), weight.shape[1]
    packed = quantizer.quantize(weight, bits)
    taken = quantizer.dequantize(packed, bits, k, weight.dtype).double()
    distance = (_values(packed, bits, group_size, k) - weight.double()[:, :, None]).abs()
    slack = _half_ulp(taken, weight.dtype) + 2.0**-20 * weight.double().abs().max() + 2.0**-20 * _per_weight(packed["scale"], group_size, k)
    assert ((weight.double() - taken).abs() <= distance.amin(dim=2) + slack).all()


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_range_covers_the_group_and_little_more(bits: int) -> None:
    weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(bits)) * 0.02).half()
    packed = _rtn().quantize(weight, bits)
    values = _values(packed, bits, 64, 64)
    least, greatest = weight.double().aminmax(dim=1)
    assert (values[:, 0, 0] == least).all()  # an fp16 weight is an fp16 minimum
    assert (values[:, 0, -1] >= greatest).all()
    assert (values[:, 0, -1] - least <= (greatest - least) * (1 + 2.0**-10)).all()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_values_are_mirrored_around_an_exact_zero(bits: int) -> None:
    weight = (torch.randn(16, 64, generator=torch.Generator().manual_seed(bits)) * 0.02).half()
    weight[:, 5] = 0
    quantizer = _rtn(symmetric=True)
    packed = quantizer.quantize(weight, bits)
    assert "minimum" not in packed
    back = quantizer.dequantize(packed, bits, 64)
    assert (back[:, 5] == 0).all()
    assert torch.equal(quantizer.dequantize(quantizer.quantize(-weight, bits), bits, 64), -back)
    assert back.unique().numel() <= 16 * (2**bits - 1)
    assert (back.abs().amax(dim=1) >= weight.abs().amax(dim=1)).all()


def test_four_bits_give_sixteen_levels_in_a_group() -> None:
    weight = torch.linspace(-1, 1, 1024).half()[None]
    back = _rtn(group_size=1024).dequantize(_rtn(group_size=1024).quantize(weight, 4), 4, 1024)
    assert back.unique().numel() == 16


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 0.1, -0.1, 1.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST])
def test_constant_groups_keep_their_value(value: float, bits: int, symmetric: bool) -> None:
    weight = torch.full((2, 20), value, dtype=torch.float16)
    quantizer = _rtn(8, symmetric)
    back = quantizer.dequantize(quantizer.quantize(weight, bits), bits, 20)
    if symmetric:  # the scale is rounded up to fp16, and the value is the outermost level
        assert torch.allclose(back, weight, rtol=2.0**-10, atol=SMALLEST * 2**bits)
    else:
        assert torch.equal(back, weight)


@pytest.mark.parametrize("bits", BITS)
def test_group_without_a_range_has_the_codes_of_its_zero(bits: int) -> None:
    for symmetric, zero in ((False, 0), (True, 1 << bits - 1)):
        assert (_rtn(8, symmetric).codes(torch.zeros(2, 20), bits).codes == zero).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("low", [-LARGEST, -1.0, 0.0, LARGEST - 32])
def test_largest_fp16_weights_do_not_overflow(low: float, bits: int, symmetric: bool) -> None:
    weight = torch.tensor([[low, LARGEST, low, LARGEST, 1.0 if low < 1 else low, LARGEST, low, LARGEST]], dtype=torch.float16)
    quantizer = _rtn(8, symmetric)
    packed = quantizer.quantize(weight, bits)
    assert (quantizer.dequantize(packed, bits, 8).float() - weight.float()).abs().max() <= packed["scale"].float().max() / 2 + 32


def test_smallest_fp16_steps_do_not_underflow() -> None:
    weight = (torch.arange(8)[None] * SMALLEST).half()
    for bits in BITS:
        packed = _rtn(8).quantize(weight, bits)
        assert packed["scale"] > 0
        back = _rtn(8).dequantize(packed, bits, 8)
        assert (back.double() - weight.double()).abs().max() <= packed["scale"].double() / 2
    assert torch.equal(back, weight)


def test_bfloat16_beyond_fp16_is_clamped_and_tiny_ones_stay_small() -> None:
    weight = torch.tensor([[1e30, -1e30, 1e-30, 0.0, 1.0, 2.0, -3.0, 1e-30]], dtype=torch.bfloat16)
    back = _rtn(8).dequantize(_rtn(8).quantize(weight, 8), 8, 8)
    assert back.isfinite().all()
    assert back[0, 0] > 60000
    assert back[0, 1] < -60000
    for tiny in (1e-30, -1e-30, 0.6 * SMALLEST, -0.6 * SMALLEST):  # the nearest fp16 number lies above or below
        constant = torch.full((1, 8), tiny, dtype=torch.bfloat16)
        back = _rtn(8).dequantize(_rtn(8).quantize(constant, 2), 2, 8)
        assert torch.equal(back, constant.half())


def test_last_group_of_a_row_may_be_shorter() -> None:
    weight = torch.cat([torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), 100 + torch.arange(6.0).expand(3, 6)], 1).half()
    packed = _rtn().quantize(weight, 3)
    assert packed["scale"].shape == (3, 2)
    assert torch.equal(packed["minimum"][:, 1], torch.full((3,), 100.0, dtype=torch.float16))
    assert packed["scale"][0, 1] == pytest.approx(5 / 7, rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 1, 8), (3, 63, 64), (2, 341, 16), (5, 128, 1024)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_bytes_are_those_of_the_tensors(bits: int, n: int, k: int, group_size: int, symmetric: bool) -> None:
    quantizer = _rtn(group_size, symmetric)
    packed = quantizer.quantize(torch.randn(n, k).half(), bits)
    assert sum(tensor.nbytes for tensor in packed.values()) == quantizer.packed_bytes(n, k, bits)


def test_strided_weight_gives_the_same_tensors() -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).half()
    plain, strided = (_rtn(8).quantize(w, 3) for w in (weight.T.contiguous(), weight.T))
    assert plain.keys() == strided.keys()
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_refused(wrong: float) -> None:
    weight = torch.ones(4, 64).half()
    weight[2, 7] = wrong
    with pytest.raises(InputError, match=r"a weight \[4, 64\] holds NaN or infinity"):
        _rtn().quantize(weight, 4)


@pytest.mark.parametrize("group_size", [0, 4, 12, -8, 1032, 2048])
def test_group_size_out_of_range_is_refused(group_size: int) -> None:
    with pytest.raises(InputError, match=f"group_size must be a multiple of 8 from 8 to 1024: got {group_size}"):
        _rtn(group_size)


def test_unknown_quantizer_is_refused() -> None:
    with pytest.raises(InputError, match="unknown quantizer 'magic'; known: .*rtn"):
        make_quantizer("magic", group_size=64, symmetric=False)
