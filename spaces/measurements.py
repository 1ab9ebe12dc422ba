"""The one table of what can be measured: fixed names, units and meanings.

Metrics of the user's own stand beside it: they have names that the table has not, and no unit. Every number that leaves a room is a
`Measurement`; a bare float is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from autoeff.errors import InputError

__all__ = ["MEASURES", "Measure", "Measurement", "Method", "Split", "described", "measure"]

Split = Literal["search", "held_out"]
Method = Literal["exact", "measured", "predicted", "estimated"]
_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


@dataclass(frozen=True)
class Measure:
    """A name that may stand in an objective or a limit.

    Attributes:
        name: The fixed name.
        unit: Its unit, as written in results.
        kind: `cost` is known by arithmetic before any forward pass; `quality` takes one.
        meaning: One sentence for `--help` and the documents.
        larger_is_better: True for scores; every other measure is minimised.
    """

    name: str
    unit: str
    kind: Literal["quality", "cost"]
    meaning: str
    larger_is_better: bool = False

    def text(self, value: float) -> str:
        """The value for people: `1.24 MB`, `12.6 MFLOP`, `0.0412`. Files hold the value itself."""
        for word, shown in (("bytes", "B"), ("FLOP", "FLOP")):
            if self.unit.startswith(word):
                prefix = next((p for p, scale in _PREFIXES.items() if abs(value) >= scale), "")
                return f"{value / _PREFIXES.get(prefix, 1):.4g} {prefix}{shown}"
        if not self.unit and value == round(value) and abs(value) < 1e12:
            return f"{value:.0f}"  # a count, such as of parameters
        return f"{value:#.4g}".removesuffix(".")


@dataclass(frozen=True)
class Measurement:
    """One measured or computed value.

    Attributes:
        name: A name of `MEASURES`, unless it is the user's own.
        value: In the unit of its measure.
        split: Text it was taken on; None for costs.
        tokens: Tokens (decoders), sentences or pairs (encoders) behind the value; None for costs.
        spread: Standard error of the mean over windows, in the same unit; None where there is none.
        statistic: What `value` is over its sample.
        method: How it came about.
        hardware: Device it was taken on; None for exact arithmetic.
        own: Whether it is a metric of the user's own: any name that the table has not, and no unit.
    """

    name: str
    value: float
    split: Split | None = None
    tokens: int | None = None
    spread: float | None = None
    statistic: str = "mean"
    method: Method = "measured"
    hardware: str | None = None
    own: bool = False

    def __post_init__(self) -> None:
        if not self.own:
            measure(self.name)
        elif self.name in MEASURES:
            raise InputError(f"the metric name {self.name!r} is a built-in one: {MEASURES[self.name].meaning}; choose another")

    @property
    def unit(self) -> str:
        return described(self.name).unit

    @property
    def is_cost(self) -> bool:
        """Whether arithmetic gives it before any forward pass."""
        return not self.own and described(self.name).kind == "cost"

    def to_json(self) -> dict[str, Any]:
        """The public form; None fields are left out."""
        row: dict[str, Any] = {"value": self.value, "unit": self.unit}
        for key in ("split", "tokens", "spread", "method", "hardware"):
            if (item := getattr(self, key)) is not None:
                row[key] = item
        return row


_ROWS = (
    Measure("kl", "nats/token", "quality", "KL divergence from the dense model on the search text"),
    Measure("kl_held_out", "nats/token", "quality", "KL divergence from the dense model on the held-out text"),
    Measure("perplexity_held_out", "perplexity", "quality", "exp of the mean negative log-likelihood on the held-out text"),
    Measure("loss_held_out", "nats/token", "quality", "mean negative log-likelihood on the held-out text, where adapters are tuned"),
    Measure("damage_cosine", "1 - cosine", "quality", "one minus the cosine to the dense sentence embedding, search text"),
    Measure("damage_cosine_held_out", "1 - cosine", "quality", "one minus the cosine to the dense sentence embedding, held-out text"),
    Measure("spearman_held_out", "rank correlation", "quality", "Spearman of embedding cosine and score on held-out pairs", True),
    Measure("passkey_accuracy", "share", "quality", "keys hidden in held-out text that are told at its end, with a cache knob", True),
    Measure("avg_bits", "bits/weight", "cost", "stored bits per weight of the searchable linears, scales and padding included"),
    Measure("linear_bytes", "bytes", "cost", "stored bytes of the searchable linears, scales and padding included"),
    Measure("weight_bytes", "bytes", "cost", "stored bytes of every tensor of the model"),
    Measure("trainable_parameters", "", "cost", "parameters of the adapters that are trained"),
    Measure("kv_bytes", "bytes", "cost", "key/value cache at the job's batch and context, scales included"),
    Measure("kv_peak_bytes", "bytes", "cost", "most that the cache takes: kv_bytes, and a block of one layer that is not thinned yet"),
    Measure(
        "bytes_per_token",
        "bytes/token",
        "cost",
        "weight and cache bytes read per decoded token at the job's batch and context; of experts those that the batch is sent to",
    ),
    Measure("flops_per_token", "FLOP/token", "cost", "floating-point operations of the linears per token"),
    Measure("attention_flops", "FLOP", "cost", "operations of attention over a prompt of the job's context, at the most"),
    Measure("decode_ms", "ms", "cost", "time of one decoding step at the job's batch and context, composed of measured kernels"),
    Measure("prefill_ms", "ms", "cost", "time to process a batch of prompts of the job's context, composed of measured kernels"),
)
MEASURES = {row.name: row for row in _ROWS}
_ACCURACY = "accuracy:"  # followed by the name of a task


def measure(name: str) -> Measure:
    """The row called `name`.

    Raises:
        InputError: There is none.
    """
    if name.startswith(_ACCURACY) and len(name) > len(_ACCURACY):
        return Measure(name, "share", "quality", f"right answers on the task {name.removeprefix(_ACCURACY)}, as lm-eval counts", True)
    if name not in MEASURES:
        raise InputError(f"unknown measurement {name!r}; known: {', '.join(sorted(MEASURES))}")
    return MEASURES[name]


def described(name: str) -> Measure:
    """The row called `name`, or for a metric of the user's own one without a unit: for reading what is stored."""
    if name.startswith(_ACCURACY):
        return measure(name)
    return MEASURES.get(name) or Measure(name, "", "quality", "a metric of the user's own")
