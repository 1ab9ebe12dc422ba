"""Exact cost of a configuration, before any forward pass.

Every cost measure is affine in a few integer primary quantities, to which each active decision adds its own change. Exact
fractions keep a limit hard to the byte, and tell the allocators along which axes a limit acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from autoeff.spaces.space import SearchSpace

__all__ = ["Affine", "CostModel"]


@dataclass(frozen=True)
class Affine:
    """`offset + sum(coefficient x primary quantity)`."""

    offset: Fraction
    coefficients: Mapping[str, Fraction]

    def __call__(self, primary: Mapping[str, int]) -> Fraction:
        return self.offset + sum((c * primary[name] for name, c in self.coefficients.items()), Fraction(0))

    def change(self, change: Mapping[str, int]) -> Fraction:
        """What a change of the primary quantities adds."""
        return sum((c * change.get(name, 0) for name, c in self.coefficients.items()), Fraction(0))


class CostModel:
    """The cost measures of a space at a batch size and context length.

    Attributes:
        measures: Affine form by measurement name.
    """

    def __init__(self, space: SearchSpace, *, batch: int, context: int) -> None:
        dense = space.dense
        one = Fraction(1)
        self.space = space
        self.measures: dict[str, Affine] = {
            "linear_bytes": Affine(Fraction(0), {"linear_bytes": one}),
            "weight_bytes": Affine(Fraction(dense["other_bytes"]), {"linear_bytes": one}),
            "avg_bits": Affine(Fraction(0), {"linear_bytes": Fraction(8, dense["linear_parameters"])}),
            "kv_bytes": Affine(Fraction(0), {"kv_bytes_per_token": Fraction(batch * context)}),
            "bytes_per_token": Affine(
                Fraction(dense["other_bytes"] - dense["lookup_bytes"], batch),
                {"linear_bytes": Fraction(1, batch), "kv_bytes_per_token": Fraction(context)},
            ),
            "flops_per_token": Affine(Fraction(0), {"flops_per_token": one}),
        }

    def exact(self, name: str, indices: Sequence[int]) -> Fraction:
        """The exact value of a cost measure."""
        return self.measures[name](self.space.primary(indices))

    def values(self, indices: Sequence[int]) -> dict[str, float]:
        """Every cost measure as stored in results."""
        primary = self.space.primary(indices)
        return {name: float(form(primary)) for name, form in self.measures.items()}

    def dense(self, name: str) -> Fraction:
        """The dense model's value, to which `0.30x` refers."""
        return self.measures[name](self.space.dense)
