"""From times of operations to integer nanoseconds of levels, which add up exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10

import torch

from autoeff.evaluators.latency_table import Fit, Operation
from autoeff.evaluators.serving import Form, served
from autoeff.evaluators.setup import LatencySpec
from autoeff.kernels import linear_wq
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Knob
from autoeff.spaces.sites import BYTES_DENSE, Linear, Site, Structure

__all__ = ["FACTORS", "GPUS", "SUBLAYERS", "UNFITTED", "Composer", "Floors", "Gpu", "Operations", "further", "kind_of"]

FACTORS = ("linear", "packed", "attend")
"""What a fit multiplies: dense linears, packed ones, attentions."""
SUBLAYERS = ("attention", "ffn")
_STEPS = 100_000  # a time is rounded to this share of the dense one, or less


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: memory bandwidth, and 16-bit tensor operations without sparsity."""

    bytes_per_s: float
    flops_per_s: float


GPUS: Mapping[str, Gpu] = {
    "A100": Gpu(2.039e12, 312e12),
    "B200": Gpu(8.0e12, 2250e12),
    "H100": Gpu(3.35e12, 989e12),
    "H200": Gpu(4.8e12, 989e12),
    "L4": Gpu(0.3e12, 121e12),
    "L40S": Gpu(0.864e12, 362e12),
    "RTX4090": Gpu(1.008e12, 165e12),
}
"""By the name that `--target` takes; of several forms the SXM one with most memory."""


class Composer:
    """Turns times of operations into integer nanoseconds: of a linear, of what else is in a sublayer, and so of levels.

    Args:
        phase: `decode` or `prefill`.
        fit: Constants and factors.
        structure: The model's sites.
        operations: Which operation a form stands for.
        times: Nanoseconds of an operation.
    """

    def __init__(
        self, phase: str, fit: Fit, structure: Structure, operations: Operations, times: Callable[[Operation], float], suffix: str = "ns"
    ) -> None:
        self.quantity, self.fit = f"{phase}_{suffix}", fit
        self._structure, self._operations, self._times = structure, operations, times
        self._unit = 1
        self._unit = 10 ** max(0, floor(log10(max(1, self.dense()) / _STEPS)))

    def dense(self) -> int:
        """The dense model's time."""
        linears = sum(self.linear(Form(linear)) for linear in self._structure.linears)
        rest = sum(self.rest(site) for site in self._structure.sites if site.kind in SUBLAYERS)
        return self._rounded(self.fit.constants["model"]) + linears + rest

    def linear(self, form: Form) -> int:
        """The time of a linear in its form."""
        operation = self._operations.linear(form)
        if form.silenced or operation is None:
            return 0
        return self._rounded(self.fit.constants[_factor(operation)] * self._times(operation))

    def rest(self, site: Site) -> int:
        """The time of what is in a sublayer besides its linears."""
        operation = self._operations.attention(site)
        attending = 0.0 if operation is None else self.fit.constants["attend"] * self._times(operation)
        return self._rounded(self.fit.constants.get(kind_of(site), 0.0) + attending)

    def change(self, knob: Knob, site: Site, level: Level, cost: Cost) -> int:
        """What a level changes at a site as earlier levels leave it; nothing where no kernel serves it."""

        def dense(linears: Sequence[Linear]) -> int:
            return sum(self.linear(Form(linear)) for linear in linears)

        if knob.silences(site, level):
            return -dense(site.linears) - sum(self.rest(part) for part in self._parts(site) if part.kind in self.fit.whole)
        if knob.name in self.fit.unserved:
            return 0
        if site.kind == "block":
            more = max((linear.reads for linear in knob.left(site, level).linears), default=1) - 1
            return more * (dense(site.linears) + sum(map(self.rest, self._parts(site))))
        if knob.kind == "structure":
            left = knob.left(site, level)
            rest = self.rest(left) - self.rest(site) if site.kind in SUBLAYERS else 0
            return dense(left.linears) - dense(site.linears) + rest
        kernel, settings = knob.kernel(site, level), knob.kernel_settings(site, level)
        if knob.kind == "cache":
            return self._rounded(self._times(operation)) if (operation := self._operations.cache(kernel, cost)) else 0
        linears = knob.left(site, level).linears
        return sum(self.linear(Form(linear, kernel=kernel, settings=settings)) for linear in linears) - dense(site.linears)

    def _parts(self, site: Site) -> list[Site]:
        """The sublayers of a block; a sublayer is the only one of itself."""
        if site.kind != "block":
            return [site]
        return [part for part in self._structure.sites if part.block == site.block and part.kind in SUBLAYERS]

    def _rounded(self, ns: float) -> int:
        """To a hundred thousandth of the whole or less, so that a grid of the exact costs stays small."""
        return round(ns / self._unit) * self._unit


def further(composers: Sequence[Composer], knob: Knob, site: Site, level: Level, cost: Cost) -> Cost:
    """A `FurtherCost`."""
    changes = {composer.quantity: composer.change(knob, site, level, cost) for composer in composers}
    return {name: change for name, change in changes.items() if change}


def kind_of(site: Site) -> str:
    """Sublayers of one kind share a constant."""
    return f"{site.kind} of experts" if any(linear.experts for linear in site.linears) else site.kind


def _factor(operation: Operation) -> str:
    return "linear" if operation.name == "linear" else "packed"


class Operations:
    """Which operation stands for a linear or an attention in one phase."""

    def __init__(
        self, phase: str, spec: LatencySpec, device: torch.device, dtype: torch.dtype, rotated: int, *, attends: bool, causal: bool
    ):
        self._phase, self._spec, self._device, self._dtype, self._attends = phase, spec, device, str(dtype).removeprefix("torch."), attends
        self._common = {"m": spec.batch * (1 if phase == "decode" else spec.tokens), "rotated": rotated}
        self._causal = causal

    def linear(self, form: Form) -> Operation | None:
        """None for experts, whose time is in the constant of their sublayer."""
        linear = form.linear
        if linear.experts:
            return None
        sizes = {**self._common, "n": linear.out_features, "k": linear.in_features}
        if not served(form.kernel, form.settings, linear, self._device):
            return self._made("linear", sizes)
        return self._made(str(form.kernel), {**sizes, **form.settings})

    def attention(self, site: Site) -> Operation | None:
        """None where nothing changes it, so that it is in the constant."""
        if site.kind != "attention" or not self._attends or site.coupling is None or site.output is None:
            return None
        of_output = site.coupling.columns[site.output].shape[1]  # of a unit: a KV head and its query heads
        size = min(of_output, *(places.shape[1] for places in site.coupling.rows.values()))
        left = next(linear for linear in site.linears if linear.of_model == site.output).in_features
        sizes = {"batch": self._spec.batch, "context": self._spec.tokens, "heads": left // size, "kv": left // of_output, "size": size}
        return self._made(f"attention_{self._phase}", sizes | {"causal": int(self._causal)})

    def cache(self, kernel: str | None, cost: Cost) -> Operation | None:
        """No cache of another form is served in a model that is measured."""
        return None

    def _made(self, name: str, sizes: Mapping[str, int]) -> Operation:
        return Operation(name, tuple(sorted(sizes.items())), self._dtype)


class Floors(Operations):
    """The same for a GPU that is not here: what the bytes and operations of everything are."""

    def linear(self, form: Form) -> Operation | None:
        linear, settings = form.linear, form.settings
        m, n, k = self._common["m"], linear.out_features, linear.in_features
        # experts that some token of the batch is sent to, at the most
        matrices = min(linear.experts, m * linear.experts_per_token) if linear.experts else 1
        rows = m * (linear.experts_per_token if linear.experts else 1)
        if form.kernel in ("linear_wq", "moe") and settings:  # of codes
            packed = linear_wq.moved_bytes(0, n, k, settings["bits"], settings["group"], bool(settings["symmetric"]))
            return self._made(
                form.kernel, {"bytes": matrices * packed + BYTES_DENSE * rows * (n + k), "flops": linear_wq.flops(rows, n, k)}
            )
        return self._made("linear", {"bytes": BYTES_DENSE * (matrices * n * k + rows * (n + k)), "flops": linear_wq.flops(rows, n, k)})

    def attention(self, site: Site) -> Operation | None:
        if site.kind != "attention":
            return None
        width, batch, context = site.linears[-1].in_features, self._spec.batch, self._spec.tokens
        if self._phase == "decode":
            pairs = batch * context
        else:
            pairs = batch * context * (context + 1) // 2 if self._causal else batch * context * context
        return self._made("attention", {"bytes": site.kv_bytes * batch * context, "flops": 4 * pairs * width})

    def cache(self, kernel: str | None, cost: Cost) -> Operation | None:
        if kernel != "attention_decode" or self._phase != "decode":
            return None
        saved = cost.get("cache_bytes", 0) + self._spec.tokens * cost.get("kv_bytes_per_token", 0)
        return self._made(kernel, {"bytes": self._spec.batch * saved, "flops": 0})

    def head(self, parameters: int) -> Operation:
        """Applied to the last token of each sequence."""
        return self._made("linear", {"bytes": BYTES_DENSE * parameters, "flops": 2 * parameters * self._spec.batch})


UNFITTED = Fit({"model": 0.0, "linear": 1.0, "packed": 1.0, "attend": 1.0})
