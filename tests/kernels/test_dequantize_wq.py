"""Packing and dequantization against the definition, bit by bit."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoeff.kernels import dequantize_wq
from autoeff.kernels.dequantize_wq import PLANES, dequantize, flops, launch, moved_bytes, pack, packed_bytes, reference, unpack

BITS = list(PLANES)
SHAPES = [(1, 1, 8), (3, 63, 64), (9, 341, 16), (7, 172, 64), (5, 128, 1024), (33, 264, 24)]  # N, K, group
Case = tuple[dict[str, Tensor], Tensor, Tensor | None]


def _codes(n: int, k: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _case(n: int, k: int, bits: int, group: int, symmetric: bool, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, -(-k // group))
    scale = (torch.rand(shape, generator=generator) * 0.1).half()
    minimum = (torch.randn(shape, generator=generator) * 0.3).half()
    return pack(_codes(n, k, bits, seed), bits), scale, None if symmetric else minimum


def _rounded(exact: Tensor) -> Tensor:
    """`exact` in float16, rounded once; torch would go through float32."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(exact.numpy().astype(np.float16))


def _ulps(values: Tensor, others: Tensor) -> int:
    """Greatest distance in representable numbers between two 16-bit tensors."""
    lines = [torch.where(x >= 0, x, -32768 - x) for x in (t.view(torch.int16).int() for t in (values, others))]
    return int((lines[0] - lines[1]).abs().max())


@pytest.mark.parametrize("bits", BITS)
@given(n=st.integers(1, 6), k=st.integers(1, 70), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_unpacking_undoes_packing(bits: int, n: int, k: int, seed: int) -> None:
    codes = _codes(n, k, bits, seed)
    assert torch.equal(unpack(pack(codes, bits), bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_bytes_are_those_of_the_tensors(bits: int, n: int, k: int, group: int, symmetric: bool) -> None:
    planes, scale, minimum = _case(n, k, bits, group, symmetric)
    stored = sum(tensor.nbytes for tensor in (*planes.values(), scale, *([] if minimum is None else [minimum])))
    assert packed_bytes(n, k, bits, group, symmetric) == stored
    assert moved_bytes(n, k, bits, group, symmetric) == stored + dequantize(planes, scale, minimum, bits, k, group).nbytes


def test_a_weight_costs_exactly_its_bits() -> None:
    assert [packed_bytes(1, 1024, bits, 1024, True) - 2 for bits in BITS] == [128 * bits for bits in BITS]
    assert flops(3, 5) == 30


def test_a_row_takes_whole_bytes_in_each_plane() -> None:
    planes = pack(_codes(64, 172, 3), 3)
    assert {name: tuple(plane.shape) for name, plane in planes.items()} == {"plane2": (64, 43), "plane1": (64, 22)}
    assert packed_bytes(64, 172, 3, 64, False) == 64 * (43 + 22 + 3 * 4)
    assert pack(torch.full((1, 5), 7, dtype=torch.uint8), 3)["plane2"].tolist() == [[0xFF, 0b11]]  # unused bits are 0


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, {"plane2": [0b11_00_01_10, 0b11_00_01_10]}),  # from the low bits up
        (4, {"plane4": [0x5A, 0xB4, 0x5A, 0xB4]}),
        (8, {"plane8": [0xA, 0x5, 0x4, 0xB, 0xA, 0x5, 0x4, 0xB]}),
        (6, {"plane4": [0x5A, 0xB4, 0x5A, 0xB4], "plane2": [0, 0]}),
    ],
)
def test_values_lie_in_the_documented_order(bits: int, expected: dict[str, list[int]]) -> None:
    codes = torch.tensor([[0xA, 0x5, 0x4, 0xB] * 2], dtype=torch.uint8) & (1 << bits) - 1
    assert {name: plane[0].tolist() for name, plane in pack(codes, bits).items()} == expected


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    planes = pack(torch.arange(8, dtype=torch.uint8)[None], 3)
    assert planes["plane2"].tolist() == [[0b11_10_01_00, 0b11_10_01_00]]
    assert planes["plane1"].tolist() == [[0b1111_0000]]


@pytest.mark.parametrize("p", [1, 2, 4])
def test_exponent_trick_reads_two_values_from_one_word(p: int) -> None:
    """As the module's docstring promises to the kernels to come."""
    bits = {1: 3, 2: 2, 4: 4}[p]
    codes = _codes(1, 32 // p, bits)
    word = int(pack(codes, bits)[f"plane{p}"].view(torch.int32)) & 0xFFFFFFFF
    fields = codes[0] >> (2 if p == 1 else 0)
    for j in range(16 // p):
        pair = (word >> p * j) & (((1 << p) - 1) * 0x00010001) | 0x64006400
        halves = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int16).view(torch.float16)
        assert (halves - 1024).tolist() == [fields[j], fields[j + 16 // p]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_values_are_the_exact_ones_rounded_once(n: int, k: int, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Scales are multiples of 2^-14 below 2^-4 and minima multiples of 2^-10 below 1: every sum fits in 24 bits, float32 is exact."""
    generator = torch.Generator().manual_seed(bits)
    shape = (n, -(-k // group))
    scale = torch.randint(1, 1024, shape, generator=generator).half() * 2.0**-14
    minimum = None if symmetric else torch.randint(-1023, 1024, shape, generator=generator).half() * 2.0**-10
    planes = pack(_codes(n, k, bits), bits)
    found = dequantize(planes, scale, minimum, bits, k, group, dtype)
    assert found.dtype == dtype
    assert found.shape == (n, k)
    assert found.is_contiguous()
    assert torch.equal(found, reference(planes, scale, minimum, bits, k, group).to(dtype))


def test_reference_is_the_formula() -> None:
    codes = torch.tensor([[0, 3, 7, 5, 1, 6, 2, 4, 7]], dtype=torch.uint8)
    scale, minimum = torch.tensor([[0.5, 2.0]]).half(), torch.tensor([[-1.0, 8.0]]).half()
    planes = pack(codes, 3)
    assert reference(planes, scale, minimum, 3, 9, 8).tolist() == [[-1, 0.5, 2.5, 1.5, -0.5, 2, 0, 1, 22]]
    assert reference(planes, scale, None, 3, 9, 8).tolist() == [[-2, -0.5, 1.5, 0.5, -1.5, 1, -1, 0, 6]]


@given(seed=st.integers(0, 10**6), bits=st.sampled_from(BITS), symmetric=st.booleans())
@settings(deadline=None, max_examples=100)
def test_any_scale_and_minimum_give_the_rounded_exact_value_within_one_ulp(seed: int, bits: int, symmetric: bool) -> None:
    """Random bit patterns as scales and minima, subnormal and huge. Two roundings (24, then 11 bits) of a sum are off by at most 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 0x7800, (2, 64, 8), generator=generator, dtype=torch.int16).view(torch.float16)  # up to 32768
    scale, minimum = drawn[0] / 256, None if symmetric else torch.where(drawn[0] < drawn[1], drawn[1], -drawn[1])
    planes = pack(_codes(64, 64, bits, seed), bits)
    exact = _rounded(reference(planes, scale, minimum, bits, 64, 8))
    found = dequantize(planes, scale, minimum, bits, 64, 8)
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert _ulps(found[finite], exact[finite]) <= (0 if symmetric else 1)


def _double_rounding() -> Case:
    """25 x 983 x 2^-24 + 1 is 2^-24 below the middle of two fp16 numbers; float32 rounds it to the middle, and that to the even one."""
    return pack(torch.tensor([[25]], dtype=torch.uint8), 8), torch.tensor([[983 * 2.0**-24]]).half(), torch.ones(1, 1).half()


def test_one_ulp_is_reached_where_two_roundings_disagree() -> None:
    exact = reference(*_double_rounding(), 8, 1, 8)
    assert exact == 1 + 1.5 * 2.0**-10 - 2.0**-24
    assert _rounded(exact) == 1 + 2.0**-10
    assert dequantize(*_double_rounding(), 8, 1, 8) == 1 + 2.0**-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "no packing of 5 bits; allowed: 2, 3, 4, 6, 8"),
        ({"bits": 3}, "3 bits need plane2; got plane4"),
        ({"k": 17}, r"scale must be a contiguous torch.float16 \(4, 3\)"),
        ({"k": 8}, r"scale must be a contiguous torch.float16 \(4, 1\)"),
        ({"group": 12}, "group must be a positive multiple of 8: got 12"),
        ({"group": 0}, "group must be a positive multiple of 8: got 0"),
        ({"scale": torch.ones(4, 2)}, r"scale must be a contiguous torch.float16 \(4, 2\) on cpu: got torch.float32"),
        ({"scale": torch.ones(2, 4).half().T}, r"got torch.float16 \(4, 2\) on cpu, strided"),
        ({"minimum": torch.ones(4, 1).half()}, r"minimum must be a contiguous torch.float16 \(4, 2\)"),
        ({"minimum": torch.ones(4, 2, device="meta").half()}, r"minimum must be .* on cpu: got torch.float16 \(4, 2\) on meta"),
        ({"out_dtype": torch.float32}, "out_dtype must be float16 or bfloat16: got torch.float32"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changes: dict[str, object], message: str) -> None:
    planes, scale, minimum = _case(4, 16, 4, 8, symmetric=False)
    arguments = {"planes": planes, "scale": scale, "minimum": minimum, "bits": 4, "k": 16, "group": 8, **changes}
    with pytest.raises(ValueError, match=message):
        dequantize(**arguments)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[16]], dtype=torch.uint8), "codes must be below 2.4 = 16: got 16"),
        (torch.tensor([[1]]), r"codes must be uint8 \[N, K\]: got torch.int64 \(1, 1\)"),
        (torch.tensor([1], dtype=torch.uint8), r"codes must be uint8 \[N, K\]: got torch.uint8 \(1,\)"),
    ],
)
def test_codes_that_cannot_be_packed_are_refused(codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, 4)


def test_strided_codes_are_packed_alike() -> None:
    codes = _codes(16, 24, 6)
    plain, strided = pack(codes.T.contiguous(), 6), pack(codes.T, 6)
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


def test_without_triton_the_torch_path_runs_and_the_kernel_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("dequantize_without_triton", dequantize_wq.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    planes, scale, minimum = _case(4, 16, 4, 8, symmetric=False)
    found = module.dequantize(planes, scale, minimum, 4, 16, 8)
    assert torch.equal(found, dequantize(planes, scale, minimum, 4, 16, 8))
    with pytest.raises(RuntimeError, match="need Triton, which is not installed: pip install"):
        module.launch(planes, scale, minimum, 4, 16, 8, found)


@pytest.mark.parametrize("out", [torch.empty(4, 17, dtype=torch.float16), torch.empty(16, 4, dtype=torch.float16).T])
def test_output_of_another_shape_or_layout_is_refused(out: Tensor) -> None:
    planes, scale, minimum = _case(4, 16, 4, 8, symmetric=False)
    with pytest.raises(ValueError, match=r"out must be contiguous \(4, 16\) on cpu"):
        launch(planes, scale, minimum, 4, 16, 8, out)


@pytest.mark.interpreted
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_interpreted_kernel_gives_the_same_bits_as_torch(n: int, k: int, group: int, bits: int, symmetric: bool) -> None:
    """float16 only: the interpreter truncates when it casts to bfloat16."""
    planes, scale, minimum = _case(n, k, bits, group, symmetric)
    out = torch.full((n, k), torch.nan, dtype=torch.float16)
    launch(planes, scale, minimum, bits, k, group, out)
    assert torch.equal(out, dequantize(planes, scale, minimum, bits, k, group))


@pytest.mark.interpreted
def test_interpreted_kernel_rounds_where_torch_rounds() -> None:
    out = torch.empty(1, 1, dtype=torch.float16)
    launch(*_double_rounding(), 8, 1, 8, out)
    assert out == 1 + 2.0**-9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), [*SHAPES, (1024, 4096, 64)])
def test_kernel_gives_the_same_bits_as_torch(
    cuda: torch.device, n: int, k: int, group: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    planes, scale, minimum = _case(n, k, bits, group, symmetric)
    moved = {name: plane.to(cuda) for name, plane in planes.items()}
    found = dequantize(moved, scale.to(cuda), None if minimum is None else minimum.to(cuda), bits, k, group, dtype)
    assert torch.equal(found.cpu(), dequantize(planes, scale, minimum, bits, k, group, dtype))
