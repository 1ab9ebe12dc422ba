"""Exact cost of a configuration, before any forward pass.

Every cost measure is affine in a few integer primary quantities, to which each active decision adds its own change. Exact
fractions keep a limit hard to the byte, and tell the allocators along which axes a limit acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from autoeff.spaces.measurements import Measurement, Method
from autoeff.spaces.space import SearchSpace

__all__ = ["LATENCIES", "Affine", "CostModel"]

LATENCIES: Mapping[str, tuple[str, Method]] = {
    "decode_ns": ("decode_ms", "predicted"),
    "prefill_ns": ("prefill_ms", "predicted"),
    "decode_floor_ns": ("decode_ms", "estimated"),
    "prefill_floor_ns": ("prefill_ms", "estimated"),
}
"""Measure and method of the primary quantities that are times: composed of measured kernels, or floors from a data sheet."""


@dataclass(frozen=True)
class Affine:
    """`offset + sum(coefficient x primary quantity)`; the arithmetic is exact, `method` says what the quantities are."""

    offset: Fraction
    coefficients: Mapping[str, Fraction]
    method: Method = "exact"

    def __call__(self, primary: Mapping[str, int]) -> Fraction:
        return self.offset + sum((c * primary[name] for name, c in self.coefficients.items()), Fraction(0))

    def times(self, factor: int) -> Affine:
        return Affine(factor * self.offset, {name: factor * c for name, c in self.coefficients.items()})

    def change(self, change: Mapping[str, int]) -> Fraction:
        """What a change of the primary quantities adds."""
        return sum((c * change.get(name, 0) for name, c in self.coefficients.items()), Fraction(0))


class CostModel:
    """The cost measures of a space at a batch size and context length.

    Attributes:
        context: Tokens that caches hold.
        measures: Affine form by measurement name.
    """

    def __init__(self, space: SearchSpace, *, batch: int, context: int) -> None:
        dense = space.dense
        one = Fraction(1)
        # of one sequence: every token in 16 bits, less what the levels of cache knobs save at the context that they were made for
        saves = {"cache_bytes": one} if "cache_bytes" in dense else {}
        kept = Affine(-Fraction(dense.get("cache_bytes", 0)), {"kv_bytes_per_token": Fraction(context), **saves})
        read = "read_bytes" if "read_bytes" in dense else "linear_bytes"
        # of all that could be spared, which is taken away from what the dense model takes, levels say what is left on average
        flops, spared_bytes = (dense.get(name, 0) for name in ("expected_flops", "expected_read_bytes"))
        self.space, self.context = space, context
        self.measures: dict[str, Affine] = {
            "linear_bytes": Affine(Fraction(0), {"linear_bytes": one}),
            "weight_bytes": Affine(Fraction(dense["other_bytes"]), {"linear_bytes": one}),
            "avg_bits": Affine(Fraction(0), {"linear_bytes": Fraction(8, dense["linear_parameters"])}),
            "kv_bytes": kept.times(batch),
            "bytes_per_token": Affine(
                Fraction(dense["other_bytes"] - dense["lookup_bytes"] - spared_bytes, batch) + kept.offset,
                dict.fromkeys((read, "expected_read_bytes") if spared_bytes else (read,), Fraction(1, batch)) | dict(kept.coefficients),
                "estimated" if spared_bytes else "exact",
            ),
            "flops_per_token": Affine(
                Fraction(-flops),
                dict.fromkeys(("flops_per_token", "expected_flops") if flops else ("flops_per_token",), one),
                "estimated" if flops else "exact",
            ),
        }
        if "attention_flops" in dense:
            self.measures["attention_flops"] = Affine(Fraction(0), {"attention_flops": one})
        if "adapter_bytes" in dense:
            self.measures["trainable_parameters"] = Affine(Fraction(0), {"trainable_parameters": one})
        for beside in {"adapter_bytes", "router_bytes"} & dense.keys():
            for name, share in (("weight_bytes", one), ("bytes_per_token", Fraction(1, batch))):
                form = self.measures[name]
                self.measures[name] = replace(form, coefficients={**form.coefficients, beside: share})
        if "block_bytes" in dense:
            self.measures["kv_peak_bytes"] = Affine(kept.offset, {**kept.coefficients, "block_bytes": one}).times(batch)
        for quantity, (name, method) in LATENCIES.items():
            if quantity in dense:
                self.measures[name] = Affine(Fraction(0), {quantity: Fraction(1, 10**6)}, method)

    def exact(self, name: str, indices: Sequence[int]) -> Fraction:
        """The exact value of a cost measure."""
        return self.measures[name](self.space.primary(indices))

    def values(self, indices: Sequence[int]) -> dict[str, float]:
        """Every cost measure as stored in results."""
        primary = self.space.primary(indices)
        return {name: float(form(primary)) for name, form in self.measures.items()}

    def measurements(self, indices: Sequence[int]) -> list[Measurement]:
        """The same with how each value came about."""
        return [Measurement(name, value, method=self.measures[name].method) for name, value in self.values(indices).items()]

    def dense(self, name: str) -> Fraction:
        """The dense model's value, to which `0.30x` refers."""
        return self.measures[name](self.space.dense)
