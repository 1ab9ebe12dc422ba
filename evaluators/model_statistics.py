"""What rules may ask about the dense model, each statistic only where a rule needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["AttentionStatistics", "Magnitudes", "ModelStatistics"]


@dataclass(frozen=True)
class AttentionStatistics:
    """Of one attention, mean over windows of text.

    Attributes:
        mass: Share of all attention that goes to the k + 1 tokens that receive most, [tokens]; rising to 1 (PrefixKV, arXiv:2412.03409).
        dispersion: Entropy of the attention of the last queries to the tokens before them, summed over heads and queries (CAKE,
            arXiv:2503.12491).
        shift: Variance over these queries of the attention to each token, summed over heads and tokens (CAKE).
    """

    mass: tuple[float, ...]
    dispersion: float
    shift: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AttentionStatistics:
        return cls(tuple(value["mass"]), value["dispersion"], value["shift"])


@dataclass(frozen=True)
class Magnitudes:
    """The absolute values of some weights.

    Attributes:
        weights: How many.
        quantiles: The k / 1000 quantiles, k from 0 to 1000.
        pq_index: 0 where all are equal, towards 1 where few hold everything (PQ Index, arXiv:2302.05601; p = 0.5, q = 1).
    """

    weights: int
    quantiles: tuple[float, ...]
    pq_index: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Magnitudes:
        return cls(value["weights"], tuple(value["quantiles"]), value["pq_index"])


@dataclass(frozen=True)
class ModelStatistics:
    """By site; empty where nobody asked.

    Attributes:
        attention: What each attention looks at; attention whose cache can be decided about.
        changes: 1 - cosine of the residual stream before and after each sublayer, mean over tokens (LLM-Drop, arXiv:2406.15786).
        inputs: Share of every principal direction, the greatest first, in the second moment of what the linears of a site are fed (EVA).
            Experts are left out, and so they are from `outliers`.
        magnitudes: Of the weights of each site of linears.
        outliers: Share of outliers among the Wanda scores of its block, the same for all sites of linears of a block (OWL). Experts
            are left out, whose inputs are not watched.
        saliency: Of the units of each sublayer (neurons, KV heads), where these are decided about: how far the greatest logits depend on
            them, by weight (NIRVANA).
        spectra: Mean over the linears of a site of the exponent of its spectrum's tail (AlphaPruning).
    """

    attention: Mapping[str, AttentionStatistics] = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    magnitudes: Mapping[str, Magnitudes] = field(default_factory=dict)
    outliers: Mapping[str, float] = field(default_factory=dict)
    saliency: Mapping[str, Magnitudes] = field(default_factory=dict)
    spectra: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def names(cls) -> frozenset[str]:
        """What can be asked for."""
        return frozenset(f.name for f in fields(cls))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelStatistics:
        made: Mapping[str, Callable[[Any], Any]] = {
            "attention": AttentionStatistics.from_json, "inputs": tuple, "magnitudes": Magnitudes.from_json,
            "saliency": Magnitudes.from_json,
        }  # fmt: skip
        return cls(**{name: {site: made.get(name, float)(found) for site, found in sites.items()} for name, sites in value.items()})
