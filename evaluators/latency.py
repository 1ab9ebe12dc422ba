"""How long a configuration takes on a device: composed from measured kernels, exact in integers, so that it can be limited like bytes.

A `LatencyTable` holds the measured time of every operation that the levels of a space need on one device. The time of a model is

    T = c + sum over sublayers (c_kind + a_attend t(attention)) + a_dense sum t(dense linear) + a_packed sum t(packed linear)

with constants fitted, once for each model, to whole models measured under a few configurations (with random values, since times do not
depend on them). Operations that are measured alternate with others; weights rotate, so that they are as cold as in the model.

For a GPU that is not at hand, times are floors: bytes over bandwidth or operations over rate, from its data sheet. Such values are
`estimated`, the others `predicted`; finalists are `measured` end to end by `measure_served`.

Source: per-operator tables after ProxylessNAS (arXiv:1812.00332); kernels as the unit, and fitted constants, after nn-Meter (MobiSys 2021).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoeff.errors import InputError
from autoeff.evaluators.latency_costs import GPUS, UNFITTED, Composer, Floors, further
from autoeff.evaluators.latency_fit import TimedModel, fitted, measured, step_of, timed
from autoeff.evaluators.latency_table import FORMAT, LatencyTable, Operation, locked
from autoeff.evaluators.loading import ModelFacts
from autoeff.evaluators.setup import LatencySpec
from autoeff.spaces.build import FurtherCost
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.measurements import Measurement, Method
from autoeff.spaces.sites import Structure
from autoeff.spaces.space import SpaceSpec

__all__ = ["Latency", "latency_of", "measure_served"]

_PREFILL_TOKENS = 4096  # the most that is measured on a CPU: minutes for a model of 1 B


@dataclass(frozen=True)
class Latency:
    """Times as costs.

    Attributes:
        device: Whose.
        method: `predicted` from measured kernels, or `estimated` from a data sheet.
        digest: Names every number that goes into a time.
        dense: Nanoseconds of the dense model by primary quantity.
        further: What levels change of them.
        notices: What the user should know.
        table: Its file.
    """

    spec: LatencySpec
    device: str
    method: Method
    digest: str
    dense: Mapping[str, int]
    further: FurtherCost
    notices: tuple[str, ...] = ()
    table: Path | None = None

    def report(self) -> dict[str, Any]:
        """For people and for `resume`."""
        return {
            "device": self.device, "method": self.method, "digest": self.digest, "batch": self.spec.batch, "context": self.spec.tokens,
            "phases": list(self.spec.phases), "table": None if self.table is None else str(self.table),
        }  # fmt: skip


def latency_of(spec: LatencySpec, facts: ModelFacts, structure: Structure, space_spec: SpaceSpec, device: torch.device) -> Latency:
    """The times of a space, of which is measured what the table lacks: seconds for a small model, minutes for one of 1 B.

    Args:
        spec: Phases, batch, context.
        facts: Of the model's files.
        structure: Its sites, coupled where a knob needs that.
        space_spec: What the user says about the space.
        device: Of the job.

    Raises:
        InputError: A phase that the model does not have, an unknown target, too long a prompt for a CPU, or a table of another device.
    """
    if facts.task not in ("decoder", "encoder"):
        raise InputError(f"model_type {facts.model_type!r} reads no text; its latency is not measured yet")
    if facts.task == "encoder" and "decode" in spec.phases:
        raise InputError(f"model_type {facts.model_type!r} is an encoder and decodes nothing; use prefill_ms")
    spec = replace(spec, context=spec.context or facts.context)
    if spec.context is None:
        raise InputError(f"model_type {facts.model_type!r} states no context length, which latency needs; give --context")
    if spec.target is not None:
        return _estimated(spec, facts, structure)
    tokens = spec.batch * spec.tokens
    if device.type == "cpu" and "prefill" in spec.phases and tokens > _PREFILL_TOKENS:
        raise InputError(
            f"on a CPU prefill_ms is measured up to {_PREFILL_TOKENS} tokens: got {tokens}; give a smaller --context or --batch"
        )
    model = TimedModel(facts, structure, space_spec, device, spec)
    path = LatencyTable.empty(device).path(Path(spec.folder))
    with locked(path):
        table = LatencyTable.read(path, device)
        needed = model.operations()
        for grown in measured(table, needed, device):
            grown.write(path)
            table = grown
        for phase in model.phases:
            if model.key(phase) not in table.fits:
                table = replace(table, fits={**table.fits, model.key(phase): fitted(model, phase, table)})
                table.write(path)
    return _composed(model, table, needed, path)


def measure_served(
    models: Mapping[str, nn.Module], spec: LatencySpec, vocabulary: int, device: torch.device
) -> dict[str, list[Measurement]]:
    """End-to-end times of served models by label; all alternate. Spread is half the distance of the quartiles."""
    found: dict[str, list[Measurement]] = {label: [] for label in models}
    hardware = LatencyTable.empty(device).hardware
    for phase in spec.phases:
        steps = {label: step_of(phase, model, vocabulary, spec) for label, model in models.items()}
        for label, timing in timed(steps, device, whole=True).items():
            spread = (timing.high_us - timing.low_us) / 2e3
            found[label].append(Measurement(f"{phase}_ms", timing.median_us / 1e3, spread=spread, statistic="median", hardware=hardware))
    return found


def _estimated(spec: LatencySpec, facts: ModelFacts, structure: Structure) -> Latency:
    """Floors from a data sheet."""
    gpu = GPUS.get(str(spec.target))
    if gpu is None:
        raise InputError(f"no data sheet of target {spec.target!r}; allowed: {', '.join(GPUS)}")

    def times(operation: Operation) -> float:
        moved = operation["bytes"] / gpu.bytes_per_s
        return (moved if moved < 0 else max(moved, operation["flops"] / gpu.flops_per_s)) * 1e9

    composers = []
    for phase in spec.phases:
        operations = Floors(phase, spec, torch.device("cuda"), facts.store_dtype, 0, attends=True, causal=facts.task == "decoder")
        head = times(operations.head(structure.head_parameters))
        fit = replace(UNFITTED, constants={**UNFITTED.constants, "model": head}, whole=("attention", "ffn"))
        composers.append(Composer(phase, fit, structure, operations, times, "floor_ns"))
    words = " and ".join(f"{phase}_ms" for phase in spec.phases)
    return Latency(
        spec=spec,
        device=str(spec.target),
        method="estimated",
        digest=digest_of(["floors", FORMAT, spec.target, asdict(gpu), list(spec.phases), spec.batch, spec.context]),
        dense={composer.quantity: composer.dense() for composer in composers},
        further=partial(further, composers),
        notices=(
            f"{words} estimated: the least time that bytes and operations allow on a {spec.target} by its data sheet; nothing was measured",
        ),
    )


def _composed(model: TimedModel, table: LatencyTable, needed: Collection[Operation], path: Path) -> Latency:
    def times(operation: Operation) -> float:
        return table.entries[operation.key].median_ns

    fits = {phase: table.fits[model.key(phase)] for phase in model.phases}
    composers = [model.composer(phase, fit, times) for phase, fit in fits.items()]
    notices = [
        f"{knob}: its shapes do not run in model_type {model.facts.model_type!r}; its levels count as dense in {phase}_ms"
        for phase, fit in fits.items()
        for knob in fit.unserved
    ]
    entries = {operation.key: table.entries[operation.key].median_ns for operation in needed}
    return Latency(
        spec=model.spec,
        device=table.hardware,
        method="predicted",
        digest=digest_of({"device": table.hardware, "entries": entries, "fits": {phase: asdict(fit) for phase, fit in fits.items()}}),
        dense={composer.quantity: composer.dense() for composer in composers},
        further=partial(further, composers),
        notices=tuple(notices),
        table=path,
    )
