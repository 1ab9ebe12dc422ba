"""Bits per weight of the linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob
from autoeff.spaces.material import Material
from autoeff.spaces.quantizer import Quantizer, known_quantizers, make_quantizer
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["Bits"]

_DENSE = 16
_WIDTHS = (8, 6, 4, 3, 2)
_STORES = ("separate", "nested")


@dataclass(frozen=True)
class Bits(Knob):
    """Codes of 8, 6, 4, 3 or 2 bits with fp16 scales instead of 16-bit weights.

    Fewer bits are fewer bytes, stored and read per token; the arithmetic stays. Fewer weights per scale are closer to the dense
    model and cost 32 (symmetric: 16) bits per group. Biases stay 16 bit.

    Attributes:
        quantizer: Name of a quantizer, see `autoeff.spaces.quantizers`.
        group_size: Inputs that share a scale; a multiple of 8 from 8 to 1024.
        symmetric: Scales without minima.
        store: `separate` keeps every width in the level bank; `nested` keeps 8-bit codes alone, a third of the bytes, and every
            lower width is their upper bits. What a level serves weighs the same.

    Source: mixed precision by layer after HAWQ, arXiv:1905.03696; group-wise scales after Q-BERT, arXiv:1909.05840; nested codes
    after Double Rounding, arXiv:2502.01199.
    """

    name: ClassVar[str] = "bits"
    kind: ClassVar[Kind] = "weight"

    quantizer: str = "rtn"
    group_size: int = 64
    symmetric: bool = False
    store: str = "separate"

    def __post_init__(self) -> None:
        if self.store not in _STORES:
            raise InputError(f"bits.store must be {' or '.join(_STORES)}: got {self.store!r}")
        nests = self._quantizer.nests  # a wrong setting of the quantizer is reported here
        if self.store == "nested" and not nests:
            allowed = ", ".join(sorted(name for name, known in known_quantizers().items() if known.nests))
            raise InputError(f"bits.store nested is not for {self.quantizer}, which fits every width on its own; allowed: {allowed}")

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "linears"]

    @property
    def needs(self) -> frozenset[str]:
        return self._quantizer.needs

    def levels(self, site: Site) -> tuple[Level, ...]:
        """16 and every lower width that saves bytes; with few inputs the scales can weigh more than the bits saved."""
        dense = BYTES_DENSE * site.parameters
        return (_DENSE, *(bits for bits in _WIDTHS if self._packed_bytes(site, bits) < dense))

    def cost(self, site: Site, level: Level) -> Cost:
        if level == _DENSE:
            return {}
        kept = sum(linear.kept_parameters for linear in site.linears)
        return {"linear_bytes": self._packed_bytes(site, int(level)) - BYTES_DENSE * kept}

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, weight in material.weights.items():
            mask = None if name not in material.masks else material.masks[name].to(material.device)
            packed = self._quantizer.quantize(weight.to(material.device), int(level), mask, material.needed(name))
            stored |= {f"{name}.{part}": tensor.cpu() for part, tensor in packed.items()}
        return stored

    def stored_level(self, site: Site, level: Level) -> Level:
        return _WIDTHS[0] if self.store == "nested" else level

    def derived(self, site: Site, level: Level, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.store != "nested" or level == _WIDTHS[0]:
            return entry
        narrowed = {name: self._quantizer.narrowed(parts, int(level)) for name, parts in _by_linear(entry).items()}
        return {f"{name}.{part}": tensor for name, parts in narrowed.items() for part, tensor in parts.items()}

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        values: dict[str, Tensor] = {}
        parts = _by_linear(packed)
        for name, weight in material.weights.items():
            values[name] = self._quantizer.dequantize(parts[name], int(level), weight.shape[1], weight.dtype, material.masks.get(name))
        return material.with_weights(values)

    def kernel(self, site: Site, level: Level) -> str | None:
        """No kernel reads codes under a mask."""
        if level == _DENSE or any(linear.kept is not None for linear in site.linears):
            return None
        return "moe" if any(linear.experts for linear in site.linears) else "linear_wq"

    def kernel_settings(self, site: Site, level: Level) -> Mapping[str, int]:
        return {} if level == _DENSE else {"bits": int(level), "group": self.group_size, "symmetric": int(self.symmetric)}

    @cached_property
    def _quantizer(self) -> Quantizer:
        return make_quantizer(self.quantizer, group_size=self.group_size, symmetric=self.symmetric)

    def _packed_bytes(self, site: Site, bits: int) -> int:
        return sum(self._quantizer.packed_bytes(linear.rows, linear.in_features, bits, linear.kept) for linear in site.linears)


def _by_linear(packed: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of every linear by their bare names."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in packed.items():
        name, _, part = key.rpartition(".")
        found.setdefault(name, {})[part] = tensor
    return found
