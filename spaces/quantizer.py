"""What a quantizer is: a rule that turns a weight into codes, scales and minima; one file each under `quantizers/`.

The base packs and unpacks in the one format that `autoeff.kernels.dequantize_wq` serves; a quantizer writes the rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.kernels import dequantize_wq
from autoeff.spaces.grid import LARGEST, Grid
from autoeff.spaces.plugins import plugin, plugins

__all__ = ["NO_STATISTICS", "Codes", "Quantizer", "known_quantizers", "make_quantizer"]

NO_STATISTICS: Mapping[str, Tensor] = MappingProxyType({})
_GROUP_SIZES = range(8, 1025, 8)


@dataclass(frozen=True)
class Codes:
    """A quantized weight before packing.

    Attributes:
        codes: uint8 [N, K], each below 2^bits; those of pruned weights say nothing.
        scale: fp16 [N, ceil(K / group_size)]; 0 for a group of which nothing is kept.
        minimum: fp16 of the same shape; None for symmetric codes, whose zero is 2^(bits-1).
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    @classmethod
    def on(cls, grid: Grid, codes: Tensor, k: int) -> Codes:
        """Float32 `codes` [N, G, size] on a grid [N, G, 1]; what follows the K-th of a row is dropped."""
        minimum = None if grid.minimum is None else grid.minimum[:, :, 0]
        return cls(codes.to(torch.uint8).reshape(len(codes), -1)[:, :k], grid.scale[:, :, 0], minimum)


@dataclass(frozen=True)
class Quantizer(ABC):
    """Base of every quantizer.

    Under a mask (bool [N, K], True = kept, equally many in every row, at least 1) only the kept codes are stored. Groups still run
    along the K inputs of the dense weight, so that scales stand where they stood.

    Attributes:
        name: As written in `--set bits.quantizer=`.
        needs: Names of the calibration statistics of a linear that the rule reads (see `evaluators/calibration.py`).
        nests: Whether `narrowed` may stand for its codes of fewer bits, because the rule does not fit each width on its own.
        group_size: Inputs of a row that share a scale; a multiple of 8 from 8 to 1024. The last group of a row may be shorter.
        symmetric: One scale per group, zero in the middle of the codes; otherwise a scale and a minimum.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    nests: ClassVar[bool] = False

    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in _GROUP_SIZES:
            raise InputError(f"group_size must be a multiple of 8 from 8 to 1024: got {self.group_size}")

    @abstractmethod
    def codes(self, weight: Tensor, bits: int, mask: Tensor | None = None, statistics: Mapping[str, Tensor] = NO_STATISTICS) -> Codes:
        """The rule.

        Args:
            weight: float32 [N, K], finite, within the range of fp16, 0 where pruned.
            bits: One of 2, 3, 4, 6, 8.
            mask: bool [N, K], True = kept; None where nothing is pruned.
            statistics: What `needs` names, on any device.
        """

    def quantize(
        self, weight: Tensor, bits: int, mask: Tensor | None = None, statistics: Mapping[str, Tensor] = NO_STATISTICS
    ) -> dict[str, Tensor]:
        """The packed weight: `plane<width>` (uint8), `scale` and, unless symmetric, `minimum` (fp16).

        Args:
            weight: fp16, bf16 or fp32 [N, K]. Values beyond the range of fp16 are clamped to it, since scales are fp16.
            bits: One of 2, 3, 4, 6, 8.
            mask: bool [N, K], True = kept; what `weight` holds elsewhere does not matter.
            statistics: What `needs` names.

        Raises:
            InputError: The weight holds NaN or infinity, or a statistic cannot be used.
            ValueError: A mask of another shape or with unequal rows, or a statistic that is missing.
        """
        if missing := sorted(self.needs - statistics.keys()):
            raise ValueError(f"quantizer {self.name} needs the statistic {missing[0]!r}; got {', '.join(sorted(statistics)) or 'none'}")
        if mask is not None:
            _kept_per_row(mask, weight)
        values = weight.float() if mask is None else weight.float().masked_fill(~mask, 0.0)
        least, greatest = (float(end) for end in torch.aminmax(values))
        if not (isfinite(least) and isfinite(greatest)):  # NaN shows in both ends
            raise InputError(f"a weight {list(weight.shape)} holds NaN or infinity and cannot be quantized; repair the checkpoint")
        if max(-least, greatest) > LARGEST:
            values = values.clamp(-LARGEST, LARGEST)
        found = self.codes(values, bits, mask, statistics)
        codes = found.codes if mask is None else found.codes[mask].reshape(len(weight), -1)
        packed = dequantize_wq.pack(codes, bits) | {"scale": found.scale}
        return packed if found.minimum is None else packed | {"minimum": found.minimum}

    def narrowed(self, packed: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
        """The 8-bit codes that `quantize` packed, rounded to their upper bits and packed again, with the scales that go with them.

        Asymmetric codes lose their low bits, and the minimum moves to the middle of what code 0 now stands for: 2^bits values that
        divide the group's range evenly, so that the nearest is at most range / 2^(bits + 1) from the 8-bit value, plus the rounding
        of the minimum to fp16. Symmetric codes are rounded to the nearest multiple, from -2^(bits-1) to 2^(bits-1) - 1.

        Args:
            packed: Of 8 bits, under a mask or not.
            bits: One of 2, 3, 4, 6.

        Source: Double Rounding, arXiv:2502.01199, where asymmetric codes too are rounded to multiples; the greatest then clamp.
        """
        codes, scale, minimum = packed["plane8"], packed["scale"], packed.get("minimum")
        ratio, middle = 1 << 8 - bits, 1 << bits - 1
        if minimum is None:
            multiples = ((codes.float() - 128) / ratio).round_().clamp_(-middle, middle - 1)
            most = LARGEST / middle  # the lowest value of weights near the end of fp16 would be beyond it
            narrow = dequantize_wq.pack(multiples.add_(middle).to(torch.uint8), bits)
            return narrow | {"scale": (scale.float() * ratio).clamp_(max=most).half()}
        centre = minimum.float() + scale.float() * ((ratio - 1) / 2)
        return dequantize_wq.pack(codes >> 8 - bits, bits) | {"scale": scale * ratio, "minimum": centre.half()}

    def dequantize(
        self, packed: Mapping[str, Tensor], bits: int, k: int, dtype: torch.dtype = torch.float16, mask: Tensor | None = None
    ) -> Tensor:
        """The weight [N, k] that `packed` stands for, in a 16-bit `dtype`, on the device of `packed`.

        Under the mask that `quantize` was given, pruned weights are exact zeros.

        Raises:
            ValueError: A mask of another shape, on another device or with unequal rows.
        """
        scale, minimum = packed["scale"], packed.get("minimum")
        if mask is None:
            return dequantize_wq.dequantize(packed, scale, minimum, bits, k, self.group_size, dtype)
        codes = dequantize_wq.unpack(packed, bits, _kept_per_row(mask, scale))
        # at 8 bits symmetric codes have another zero; their values are the same
        spread = torch.zeros(mask.shape, dtype=torch.uint8, device=scale.device).masked_scatter_(mask, codes)
        planes = {"plane8": spread if minimum is not None else spread + (128 - (1 << bits - 1))}
        return dequantize_wq.dequantize(planes, scale, minimum, 8, k, self.group_size, dtype).masked_fill_(~mask, 0.0)

    def packed_bytes(self, n: int, k: int, bits: int, kept: int | None = None) -> int:
        """Exact bytes of what `quantize` returns for a weight [n, k] of which `kept` in every row are kept (None: all).

        The mask is not counted; it belongs to the knob that made it.
        """
        dense = dequantize_wq.packed_bytes(n, k, bits, self.group_size, self.symmetric)
        return dense if kept is None else dense - n * sum(-(-k * p // 8) - -(-kept * p // 8) for p in dequantize_wq.PLANES[bits])

    def group_of(self, weight: Tensor) -> int:
        """Inputs in a group of `weight` [N, K]: one that is wider than the row ends with it."""
        return min(self.group_size, weight.shape[1])


def _kept_per_row(mask: Tensor, like: Tensor) -> int:
    """How many weights `mask` keeps in every row.

    Raises:
        ValueError: It does not go with `like`, or rows differ.
    """
    if mask.dtype != torch.bool or len(mask) != len(like) or mask.device != like.device:
        raise ValueError(
            f"a mask must be bool with {len(like)} rows on {like.device}: got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    least, greatest = (int(end) for end in torch.aminmax(mask.sum(1)))
    if not 0 < least == greatest:
        raise ValueError(f"a mask must keep equally many weights in every row, at least 1: got {least} to {greatest}")
    return least


_WHERE = ("autoeff.spaces.quantizers", Quantizer, "autoeff.quantizers")


def known_quantizers() -> dict[str, type[Quantizer]]:
    """Every quantizer on this machine by name."""
    return plugins(*_WHERE)


def make_quantizer(name: str, *, group_size: int, symmetric: bool) -> Quantizer:
    """The quantizer `name`.

    Raises:
        InputError: Unknown name, or a setting it does not allow.
    """
    made: Quantizer = plugin(*_WHERE, name)(group_size=group_size, symmetric=symmetric)
    return made
