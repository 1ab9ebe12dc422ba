"""What a quantizer is: a rule that turns a weight into codes, scales and minima; one file each under `quantizers/`.

The base packs and unpacks in the one format that `autoeff.kernels.dequantize_wq` serves; a quantizer writes the rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.kernels import dequantize_wq
from autoeff.spaces.plugins import plugin, plugins

__all__ = ["Codes", "Quantizer", "known_quantizers", "make_quantizer"]

_GROUP_SIZES = range(8, 1025, 8)
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Codes:
    """A quantized weight before packing.

    Attributes:
        codes: uint8 [N, K], each below 2^bits.
        scale: fp16 [N, ceil(K / group_size)].
        minimum: fp16 of the same shape; None for symmetric codes, whose zero is 2^(bits-1).
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None


@dataclass(frozen=True)
class Quantizer(ABC):
    """Base of every quantizer.

    Attributes:
        name: As written in `--set bits.quantizer=`.
        group_size: Inputs of a row that share a scale; a multiple of 8 from 8 to 1024. The last group of a row may be shorter.
        symmetric: One scale per group, zero in the middle of the codes; otherwise a scale and a minimum.
    """

    name: ClassVar[str]

    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in _GROUP_SIZES:
            raise InputError(f"group_size must be a multiple of 8 from 8 to 1024: got {self.group_size}")

    @abstractmethod
    def codes(self, weight: Tensor, bits: int) -> Codes:
        """The rule.

        Args:
            weight: float32 [N, K], finite, within the range of fp16.
            bits: One of 2, 3, 4, 6, 8.
        """

    def quantize(self, weight: Tensor, bits: int) -> dict[str, Tensor]:
        """The packed weight: `plane<width>` (uint8), `scale` and, unless symmetric, `minimum` (fp16).

        Args:
            weight: fp16 or bf16 [N, K]. Values beyond the range of fp16 are clamped to it, since scales are fp16.
            bits: One of 2, 3, 4, 6, 8.

        Raises:
            InputError: The weight holds NaN or infinity.
        """
        values = weight.float()
        least, greatest = (float(end) for end in torch.aminmax(values))
        if not (isfinite(least) and isfinite(greatest)):  # NaN shows in both ends
            raise InputError(f"a weight {list(weight.shape)} holds NaN or infinity and cannot be quantized; repair the checkpoint")
        if max(-least, greatest) > _LARGEST:
            values = values.clamp(-_LARGEST, _LARGEST)
        found = self.codes(values, bits)
        packed = dequantize_wq.pack(found.codes, bits) | {"scale": found.scale}
        return packed if found.minimum is None else packed | {"minimum": found.minimum}

    def dequantize(self, packed: Mapping[str, Tensor], bits: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
        """The weight [N, k] that `packed` stands for, in a 16-bit `dtype`, on the device of `packed`."""
        return dequantize_wq.dequantize(packed, packed["scale"], packed.get("minimum"), bits, k, self.group_size, dtype)

    def packed_bytes(self, n: int, k: int, bits: int) -> int:
        """Exact bytes of what `quantize` returns for a weight [n, k]."""
        return dequantize_wq.packed_bytes(n, k, bits, self.group_size, self.symmetric)


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
