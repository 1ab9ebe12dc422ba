"""A linear with 8-bit weights and 8-bit activations: y = x W^T + b, the product itself in int8 or in fp8 (e4m3).

A weight [N, K] is kept as codes [N, K], int8 or float8_e4m3fn, and a float32 `scale` for each output: value = code * scale. Activations get
the same form at every call, with a scale for each token: scale = absmax / 127 (int8) or absmax / 448 (fp8), code = x * (limit / absmax)
rounded to nearest, ties to even; a token without a
number above 2^-100 has codes of 0. Then y = (codes of x . codes of W) * scale of x * scale of W + b.

On CUDA two kernels: one quantises a token a program; the other multiplies with the weight as the left operand (Y^T = W X^T, as in
linear_wq), so that its rows fill the tensor core at any number of tokens. K may be split over programs, whose float32 parts are added in a
fixed order. int8 sums are exact int32. fp8 sums leave the tensor core's narrow accumulator for float32 every 128 inputs; all of K in it
would keep about 14 bits (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
On the CPU int8 goes through torch's int8 product; fp8 codes become float32, in which their products are exact, at every call.

Only this form of quantisation saves time in prefill: the product itself runs at twice the 16-bit rate.

Source: per-token and per-channel scales, ZeroQuant (Yao et al. 2022, arXiv:2206.01861).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from autoeff.kernels import split_k, tuned

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = [
    "LIMITS", "Weight", "flops", "hopper_cases", "launch", "linear", "moved_bytes", "pack", "packed_bytes", "quantize", "quantize_launch",
    "reference",
]  # fmt: skip

LIMITS: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Greatest code by form."""

_OPS = {torch.int8: "linear_w8a8_int8", torch.float8_e4m3fn: "linear_w8a8_fp8"}
_OUT = (torch.float16, torch.bfloat16)
_LEAST = 2.0**-100  # of a token; the inverse of a smaller one may be infinite
_MAX_BLOCK_K = 4096  # of the quantising kernel: 32 numbers a thread in registers


@dataclass(frozen=True)
class Weight:
    """A quantised weight [N, K], checked once.

    Attributes:
        codes: int8 or float8_e4m3fn [N, K], contiguous.
        scale: float32 [N].

    Raises:
        ValueError: A shape, dtype or device that does not belong to the other.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        codes, scale = self.codes, self.scale
        if codes.dtype not in LIMITS or codes.dim() != 2 or not codes.is_contiguous():
            raise ValueError(f"codes must be contiguous int8 or float8_e4m3fn [N, K]: got {codes.dtype} {tuple(codes.shape)}")
        if (
            scale.dtype != torch.float32
            or tuple(scale.shape) != codes.shape[:1]
            or scale.device != codes.device
            or not scale.is_contiguous()
        ):
            found = f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
            raise ValueError(f"scale must be contiguous torch.float32 ({codes.shape[0]},) on {codes.device}: got {found}")

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]


def pack(weight: Tensor, form: torch.dtype) -> Weight:
    """The weight [N, K] rounded to int8 or float8_e4m3fn, with the greatest magnitude of each row at the limit of the form.

    Raises:
        ValueError: Another form, or a weight that is no floating-point matrix.
    """
    if form not in LIMITS or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"need a floating-point [N, K] and int8 or float8_e4m3fn: got {weight.dtype} {tuple(weight.shape)} and {form}")
    return Weight(*_quantized(weight, form))


def quantize(x: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and float32 scales [M] of contiguous activations [M, K]; on CUDA by Triton.

    Raises:
        ValueError: Another form, or x is no contiguous matrix of float16 or bfloat16.
    """
    if x.is_cuda:
        codes, scale = torch.empty(x.shape, dtype=form, device=x.device), torch.empty(x.shape[0], device=x.device)
        quantize_launch(x, codes, scale)
        return codes, scale
    _check_rows(x, form)
    return _quantized(x, form)


def packed_bytes(n: int, k: int) -> int:
    """Bytes of the packed tensors of a weight [n, k]."""
    return n * (k + 4)


def moved_bytes(m: int, n: int, k: int) -> int:
    """Bytes that the operation reads and writes at the least: weight, 16-bit x and y. The codes of x may stay in a cache."""
    return packed_bytes(n, k) + 2 * m * (n + k)


def flops(m: int, n: int, k: int) -> int:
    """Operations of the product, at the rate of 8-bit operands."""
    return 2 * m * n * k


def reference(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The exact product of the codes, float64 [..., N]; those of x are rounded as the definition says, number by number."""
    limit = LIMITS[weight.codes.dtype]
    rows = x.cpu().reshape(-1, weight.k).float()
    absmax = rows.abs().amax(1, keepdim=True) if weight.k else rows.new_zeros(len(rows), 1)
    inverse = torch.where(absmax > _LEAST, limit / absmax, 0.0)
    scaled = (rows * inverse).clamp(-limit, limit).double()
    if weight.codes.dtype == torch.int8:
        codes = scaled.round()
    else:  # three fraction bits, steps of 2^-9 below 2^-6
        step = torch.exp2(scaled.abs().clamp_min(2.0**-6).log2().floor() - 3)
        codes = (scaled / step).round() * step
    y = codes * (absmax / limit).double() @ (weight.codes.cpu().double() * weight.scale.cpu().double()[:, None]).T
    return (y if bias is None else y + bias.cpu().double()).view(*x.shape[:-1], weight.n)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The product x W^T + b, [..., N] in the dtype of x: on CUDA by Triton, on the CPU by torch operations.

    Args:
        x: float16 or bfloat16 [..., K].
        weight: On the device of x.
        bias: [N] in the dtype of x.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: The tensors are on a GPU and Triton is not installed.
    """
    _check(x, weight, bias)
    codes, scale = quantize(x.reshape(-1, weight.k).contiguous(), weight.codes.dtype)
    y = torch.empty(codes.shape[0], weight.n, dtype=x.dtype, device=x.device)
    if x.is_cuda:
        launch(codes, scale, weight, bias, y, tuned.nearest(_OPS[codes.dtype], codes.shape[0], weight.n, weight.k, x.device))
    else:
        if weight.codes.dtype == torch.int8:
            sums = torch._int_mm(codes, weight.codes.T).float()
        else:
            sums = dense_linear(codes.float(), weight.codes.float())
        sums = sums.mul_(scale[:, None]).mul_(weight.scale)
        y.copy_(sums if bias is None else sums.add_(bias))
    return y.view(*x.shape[:-1], weight.n)


def quantize_launch(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Runs the Triton kernel from contiguous x [M, K] into codes [M, K] and float32 scales [M].

    Raises:
        ValueError: As in `quantize`.
        RuntimeError: Triton is not installed.
    """
    _check_rows(x, codes.dtype)
    if codes.shape != x.shape or scale.dtype != torch.float32 or scale.shape != x.shape[:1] or not codes.is_contiguous():
        raise ValueError(
            f"codes and scale must be {tuple(x.shape)} and float32 ({x.shape[0]},): got {tuple(codes.shape)}, {tuple(scale.shape)}"
        )
    if triton is None:
        raise RuntimeError("8-bit products on a GPU need Triton, which is not installed: pip install 'triton>=3.6'")
    if x.shape[0]:
        kernel, grid, arguments, options = _quantize_arguments(x, codes, scale)
        with torch.cuda.device(x.get_device()):  # on the CPU (-1) it does nothing
            kernel[grid](*arguments, **options)


def launch(codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]) -> None:
    """Runs the Triton kernel from the activations' contiguous codes [M, K] and scales [M] into y [M, N], float16 or bfloat16.

    Raises:
        ValueError: A shape, dtype or device that does not belong to the others.
        RuntimeError: Triton is not installed.
    """
    m = codes.shape[0]
    if codes.dtype != weight.codes.dtype or tuple(codes.shape) != (m, weight.k) or not codes.is_contiguous() or scale.shape != (m,):
        raise ValueError(f"codes must be contiguous {weight.codes.dtype} (M, {weight.k}): got {codes.dtype} {tuple(codes.shape)}")
    if tuple(y.shape) != (m, weight.n) or y.dtype not in _OUT or not y.is_contiguous():
        raise ValueError(f"y must be contiguous float16 or bfloat16 {(m, weight.n)}: got {y.dtype} {tuple(y.shape)}")
    split_k.launch("8-bit products", y, bias, config["splits"], lambda added, to: _arguments(codes, scale, weight, added, to, config))


def hopper_cases() -> Iterator[tuple[str, str, Any, Any, Any, Any, bool]]:
    """Every form x committed configuration for `autoeff.kernels.compile`, in the order of its `Case`."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for form, dtype in product(LIMITS, _OUT):
        case = _quantize_arguments(meta(16, 14336, dtype=dtype), meta(16, 14336, dtype=form), meta(16))
        yield "linear_w8a8 quantize", f"{form}, {dtype}; one configuration", *case, False
    for form, config in ((form, config) for form, op in _OPS.items() for config in tuned.configurations(op)):
        m, n, k, splits = config["m"], config["n"], config["k"], config["splits"]
        y = meta(m, n, dtype=torch.bfloat16) if splits == 1 else meta(splits, m, n)
        launched = _arguments(meta(m, k, dtype=form), meta(m), Weight(meta(n, k, dtype=form), meta(n)), None, y, config)
        yield "linear_w8a8 left", f"{form}; {tuned.label(config)}", *launched, config["block_n"] >= 64


def _check_rows(x: Tensor, form: torch.dtype) -> None:
    if form not in LIMITS or x.dtype not in _OUT or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"need contiguous float16 or bfloat16 [M, K] and int8 or float8_e4m3fn: got {x.dtype} {tuple(x.shape)} and {form}")


def _check(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    device = weight.codes.device
    if x.dtype not in _OUT or x.shape[-1] != weight.k or x.device != device:
        raise ValueError(f"x must be float16 or bfloat16 [..., {weight.k}] on {device}: got {x.dtype} {tuple(x.shape)} on {x.device}")
    if bias is not None and (tuple(bias.shape) != (weight.n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias must be {x.dtype} {(weight.n,)} on {x.device}: got {bias.dtype} {tuple(bias.shape)} on {bias.device}")


def _quantized(rows: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    limit, rows = LIMITS[form], rows.float()
    absmax = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    scaled = rows * torch.where(absmax > _LEAST, limit / absmax, 0.0)[:, None]
    scaled = scaled.clamp_(-limit, limit)  # x * (limit / x) may pass the limit by a rounding
    return (scaled.round_() if form == torch.int8 else scaled).to(form), absmax / limit


def _quantize_arguments(x: Tensor, codes: Tensor, scale: Tensor) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    form = codes.dtype
    constants = {
        "LIMIT": LIMITS[form], "LEAST": _LEAST, "WHOLE": form == torch.int8, "num_warps": 4,
        "BLOCK_K": min(_MAX_BLOCK_K, max(16, triton.next_power_of_2(x.shape[1]))),
        "enable_fp_fusion": False,  # a fused x * inverse + magic rounds once where torch rounds twice
    }  # fmt: skip
    return _quantize_kernel, (x.shape[0],), (x, codes, scale, x.shape[1]), constants


def _arguments(
    codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, config: Mapping[str, Any]
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Kernel, grid, positional arguments and constants of a launch; y is [splits, M, N] where K is split."""
    (m, k), n, splits = codes.shape, weight.n, config["splits"]
    grid = (triton.cdiv(n, config["block_n"]), triton.cdiv(m, config["block_m"]), splits)
    steps = triton.cdiv(triton.cdiv(k, config["block_k"]), splits)
    arguments = (codes, weight.codes, scale, weight.scale, weight.scale if bias is None else bias, y, m, n, k, steps)
    constants = {
        "BIAS": bias is not None, "WHOLE": codes.dtype == torch.int8, "BLOCK_N": config["block_n"], "BLOCK_M": config["block_m"],
        "BLOCK_K": config["block_k"], "num_warps": config["warps"], "num_stages": config["stages"],
    }  # fmt: skip
    return _left_kernel, grid, arguments, constants


if triton is not None:

    @triton.jit
    def _quantize_kernel(  # type: ignore[no-untyped-def]
        x, codes, scale, k, LIMIT: tl.constexpr, LEAST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        greatest = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, k, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            greatest = tl.maximum(greatest, tl.abs(tl.load(x + row * k + column, mask=column < k, other=0.0).to(tl.float32)))
        absmax = tl.max(greatest, 0)
        # exact division, so that the codes are those of torch
        inverse = tl.where(absmax > LEAST, tl.div_rn(LIMIT, tl.maximum(absmax, LEAST)), 0.0)
        tl.store(scale + row, tl.div_rn(absmax, LIMIT))
        for start in range(0, k, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            value = tl.load(x + row * k + column, mask=column < k, other=0.0).to(tl.float32) * inverse
            value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
            # rounded to nearest, ties to even, before the conversion, which differs between backends
            if WHOLE:  # numbers about 1.5 * 2^23 are 1 apart
                value = (value + 12582912.0) - 12582912.0
            else:  # three fraction bits, but steps of 2^-9, as about 1.5 * 2^14, below the normal numbers
                bits = value.to(tl.int32, bitcast=True)
                normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
                value = tl.where(tl.abs(value) < 0.015625, (value + 24576.0) - 24576.0, normal)
            tl.store(codes + row * k + column, value.to(codes.dtype.element_ty), mask=column < k)

    @triton.jit
    def _left_kernel(  # type: ignore[no-untyped-def]
        x, weight, x_scale, w_scale, bias, y, m, n, k, steps,
        BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE else tl.float32)
        first = tl.program_id(2) * steps
        for number in range(first, tl.minimum(first + steps, (k + BLOCK_K - 1) // BLOCK_K)):
            column = number * BLOCK_K + tl.arange(0, BLOCK_K)
            at_w = row.to(tl.int64)[:, None] * k + column[None, :]
            at_x = token.to(tl.int64)[None, :] * k + column[:, None]
            inside_w, inside_x = (row[:, None] < n) & (column[None, :] < k), (column[:, None] < k) & (token[None, :] < m)
            if WHOLE:
                left, right = tl.load(weight + at_w, mask=inside_w, other=0), tl.load(x + at_x, mask=inside_x, other=0)
                total = tl.dot(left, right, total, out_dtype=tl.int32)
            else:
                left, right = tl.load(weight + at_w, mask=inside_w, other=0.0), tl.load(x + at_x, mask=inside_x, other=0.0)
                total = tl.dot(left, right, total, max_num_imprecise_acc=BLOCK_K)
        by_row, by_token = tl.load(w_scale + row, mask=row < n, other=0.0), tl.load(x_scale + token, mask=token < m, other=0.0)
        result = total.to(tl.float32) * by_token[None, :] * by_row[:, None]
        if BIAS:
            result += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        at_y = (tl.program_id(2).to(tl.int64) * m + token[None, :]) * n + row[:, None]
        tl.store(y + at_y, result.to(y.dtype.element_ty), mask=(row[:, None] < n) & (token[None, :] < m))
