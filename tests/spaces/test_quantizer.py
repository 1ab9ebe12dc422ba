"""What every quantizer promises: exact bytes, masks, devices of statistics; round to nearest is checked more closely in its own file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.quantizer import known_quantizers, make_quantizer

BITS = [2, 3, 4, 6, 8]
LARGEST = 65504.0
NAMES = ["gptq", "hqq", "rtn"]


def _statistics(k: int, generator: torch.Generator) -> dict[str, Tensor]:
    inputs = torch.randn(2 * k + 5, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return {"hessian": inputs.T @ inputs / len(inputs)}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A 16-bit weight, a mask with equal rows, statistics."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n, k = draw(st.integers(1, 4)), draw(st.sampled_from([1, 7, 8, 9, 63, 64, 130, 341]))
    kept = draw(st.integers(1, k))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    weight = draw(st.sampled_from([0.0, 1e-6, 0.02, 1.0, 3e4])) * torch.randn(n, k, generator=generator)
    mask = torch.zeros(n, k, dtype=torch.bool).scatter_(1, torch.rand(n, k, generator=generator).argsort(1)[:, :kept], True)
    return weight.clamp(-LARGEST, LARGEST).to(dtype).clamp(-LARGEST, LARGEST), mask, _statistics(k, generator)


def test_the_quantizers_tested_here_are_those_that_exist() -> None:
    assert set(NAMES) <= known_quantizers().keys()


@given(cases(), st.sampled_from(NAMES), st.sampled_from(BITS), st.sampled_from([8, 64, 1024]), st.booleans())
@settings(deadline=None, max_examples=200)
def test_what_is_kept_takes_the_stated_bytes_and_comes_back_near_and_what_is_pruned_as_zero(
    case: tuple[Tensor, Tensor, dict[str, Tensor]], name: str, bits: int, group_size: int, symmetric: bool
) -> None:
    weight, mask, statistics = case
    n, k = weight.shape
    kept = int(mask[0].sum())
    quantizer = make_quantizer(name, group_size=group_size, symmetric=symmetric)
    packed = quantizer.quantize(weight, bits, mask, statistics)
    assert sum(tensor.nbytes for tensor in packed.values()) == quantizer.packed_bytes(n, k, bits, kept)
    assert packed["scale"].shape == (n, -(-k // group_size))
    back = quantizer.dequantize(packed, bits, k, weight.dtype, mask)
    assert back.shape == weight.shape
    assert back.dtype == weight.dtype
    assert (back[~mask] == 0).all()
    assert back.isfinite().all()
    empty = torch.nn.functional.pad(mask, (0, -k % group_size)).reshape(n, -1, group_size).any(2).logical_not()
    assert (packed["scale"][empty] == 0).all()
    if name == "rtn":  # |w - w'| <= scale / 2 and the rounding of w' to 16 bits
        scale = packed["scale"].double().repeat_interleave(group_size, dim=1)[:, :k]
        slack = torch.clamp(back.double().abs() * torch.finfo(back.dtype).eps / 2, min=2.0**-25)
        bound = scale / 2 + slack + 2.0**-20 * (weight.double().abs().max() + (scale * 2**bits))
        assert ((weight.double() - back.double()).abs() <= bound)[mask].all()


@given(cases(), st.sampled_from(NAMES), st.sampled_from(BITS), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_mask_that_keeps_everything_changes_nothing(
    case: tuple[Tensor, Tensor, dict[str, Tensor]], name: str, bits: int, symmetric: bool
) -> None:
    weight, mask, statistics = case
    quantizer = make_quantizer(name, group_size=16, symmetric=symmetric)
    everything = torch.ones_like(mask)
    plain, masked = quantizer.quantize(weight, bits, None, statistics), quantizer.quantize(weight, bits, everything, statistics)
    assert plain.keys() == masked.keys()
    assert all(torch.equal(plain[part], masked[part]) for part in plain)
    k = weight.shape[1]
    assert torch.equal(quantizer.dequantize(plain, bits, k), quantizer.dequantize(masked, bits, k, mask=everything))
    assert quantizer.packed_bytes(*weight.shape, bits) == quantizer.packed_bytes(*weight.shape, bits, k)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["hqq", "rtn"])
@pytest.mark.parametrize("bits", BITS)
def test_ranges_are_those_of_the_kept_weights_alone(bits: int, name: str, symmetric: bool) -> None:
    """Each group's kept weights, quantized as a row of their own, give the same scale, minimum and values."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(3, 150, generator=generator).half()
    mask = torch.zeros(3, 150, dtype=torch.bool).scatter_(1, torch.rand(3, 150, generator=generator).argsort(1)[:, :40], True)
    mask[:, 64:128] = False
    mask[0, :64], mask[1, 128:], mask[2, 3], mask[2, 4:64] = True, True, True, False  # unequal: the rule alone is tested
    quantizer, whole = (make_quantizer(name, group_size=size, symmetric=symmetric) for size in (64, 1024))
    found = quantizer.codes(weight.float().masked_fill(~mask, 0.0), bits, mask)
    for row in range(3):
        for group in range(3):
            inside = torch.zeros(150, dtype=torch.bool)
            inside[64 * group : 64 * group + 64] = mask[row, 64 * group : 64 * group + 64]
            if not inside.any():
                assert found.scale[row, group] == 0
                continue
            alone = whole.codes(weight[row, inside].float()[None], bits)
            assert torch.equal(found.codes[row, inside], alone.codes[0])
            assert found.scale[row, group] == alone.scale[0, 0]
            if found.minimum is not None and alone.minimum is not None:
                assert found.minimum[row, group] == alone.minimum[0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_where_nothing_is_kept_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(4, 64, generator=generator).half(), torch.zeros(4, 64, dtype=torch.bool)
    mask[:, ::2] = True
    statistics = _statistics(64, generator)
    quantizer = make_quantizer(name, group_size=16, symmetric=False)
    plain = quantizer.quantize(weight.masked_fill(~mask, 0.0), 3, mask, statistics)
    other = quantizer.quantize(weight.masked_fill(~mask, torch.nan), 3, mask, statistics)
    assert all(torch.equal(plain[part], other[part]) for part in plain)


def test_wrong_masks_and_missing_statistics_are_refused() -> None:
    quantizer, weight = make_quantizer("rtn", group_size=8, symmetric=False), torch.ones(2, 8).half()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="a mask must keep equally many weights in every row, at least 1: got 7 to 8"):
        quantizer.quantize(weight, 4, mask)
    with pytest.raises(ValueError, match="at least 1: got 0 to 0"):
        quantizer.quantize(weight, 4, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="a mask must be bool with 2 rows"):
        quantizer.quantize(weight, 4, mask.float())
    with pytest.raises(ValueError, match="quantizer gptq needs the statistic 'hessian'; got input_norm"):
        make_quantizer("gptq", group_size=8, symmetric=False).quantize(weight, 4, None, {"input_norm": torch.ones(8)})


@pytest.mark.parametrize("name", NAMES)
def test_weight_that_is_not_finite_is_refused(name: str) -> None:
    weight = torch.full((2, 8), torch.nan).half()
    with pytest.raises(InputError, match=r"a weight \[2, 8\] holds NaN or infinity"):
        make_quantizer(name, group_size=8, symmetric=False).quantize(weight, 4, None, {"hessian": torch.eye(8)})


@given(cases(), st.sampled_from([2, 3, 4, 6]), st.sampled_from([8, 64]), st.booleans())
@settings(deadline=None, max_examples=150)
def test_narrowed_codes_are_the_nearest_to_the_values_of_the_8_bit_codes(
    case: tuple[Tensor, Tensor, dict[str, Tensor]], bits: int, group_size: int, symmetric: bool
) -> None:
    """Against every value of the narrow grid, in the bytes of codes of that width, under a mask."""
    weight, mask = case[0] / 2, case[1]  # whose ranges leave room for -2^(bits-1) steps
    quantizer, (n, k), kept = make_quantizer("rtn", group_size=group_size, symmetric=symmetric), weight.shape, int(mask[0].sum())
    wide = quantizer.quantize(weight, 8, mask)
    narrow = quantizer.narrowed(wide, bits)
    assert sum(tensor.nbytes for tensor in narrow.values()) == quantizer.packed_bytes(n, k, bits, kept)
    back = quantizer.dequantize(narrow, bits, k, torch.float16, mask).double()
    eight, scale = quantizer.dequantize(wide, 8, k, torch.float16, mask).double(), _spread(narrow["scale"], group_size, k)
    start = _spread(narrow["minimum"], group_size, k) if "minimum" in narrow else -(1 << bits - 1) * scale
    values = torch.arange(1 << bits) * scale[:, :, None] + start[:, :, None]
    least = (values - eight[:, :, None]).abs().amin(2)
    rounding = 2.0**-10 * (values.abs().amax(2) + eight.abs()) + 2.0**-23
    assert ((back - eight).abs() <= least + rounding)[mask].all()
    if not symmetric:
        assert (least <= scale / 2 + rounding)[mask].all()


def test_narrowed_codes_are_the_upper_bits() -> None:
    weight = torch.arange(256.0)[None].half()  # 8 bits: code = weight
    quantizer = make_quantizer("rtn", group_size=256, symmetric=False)
    wide = quantizer.quantize(weight, 8)
    for bits, values in ((2, [31.5, 95.5, 159.5, 223.5]), (3, [15.5 + 32 * code for code in range(8)])):
        back = quantizer.dequantize(quantizer.narrowed(wide, bits), bits, 256)
        assert torch.equal(back[0].float(), torch.tensor(values).repeat_interleave(256 >> bits))


def _spread(parts: Tensor, group_size: int, k: int) -> Tensor:
    return parts.double().repeat_interleave(group_size, dim=1)[:, :k]
