"""What a runner will hold in memory and on disk, worked out from shapes before a weight is loaded.

A part that cannot shrink is refused where it does not fit. Kept block states and decoded levels share what is left; neither
changes a value. Figures are predictions: within 15 % of what was measured on the shapes of Llama 3.2 1B.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoeff.errors import InputError
from autoeff.evaluators.bank import Bank, Statistics, Step, entry_bytes
from autoeff.evaluators.forward import BATCH_TOKENS, state_bytes, state_stride
from autoeff.evaluators.loading import ModelFacts, compute_dtype, keeps_narrow, memory_of
from autoeff.evaluators.quality import CHUNK_LOGITS, CHUNK_ROWS
from autoeff.evaluators.samples import MOST_TOKENS
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.evaluators.text import Passages
from autoeff.evaluators.widening import narrow_names, scratch_elements
from autoeff.spaces.knob import Knob
from autoeff.spaces.knobs.lora_rank import LoraRank
from autoeff.spaces.material import SAMPLES
from autoeff.spaces.measurements import Split
from autoeff.spaces.sites import Structure
from autoeff.spaces.space import SearchSpace

__all__ = ["Footprint", "check_disk", "footprint_of", "steps_of"]

_PROCESS_BYTES = 500 << 20  # Python with torch and transformers, measured
_KEEP_STATES_BYTES = 2 << 30
_KEEP_DECODED_BYTES = 2 << 30
_MARGIN = 0.1  # of what may be held is not given to what can do with less
_HEAP_SHARE = 0.3  # what malloc keeps of freed memory between decoded levels, per byte of them; measured
_BUILD_BYTES_PER_WEIGHT = 20  # float32 values, codes, groups and what packing takes, of one linear; measured
_SECOND_ORDER_BYTES = 40  # float64 copies of a hessian, per element of it, where a level is built from one
_FILE_BYTES = 1 << 10  # of an entry besides its tensors
_ENOUGH = 1 << 60


@dataclass(frozen=True)
class Footprint:
    """Predicted use of memory and disk.

    Attributes:
        parts: Bytes by what they are for, on the device; on a CPU those of the process among them.
        capacity: Bytes that may be held.
        narrow: Parameters that are kept in 16 bits although the device computes in float32.
        state_stride: The inputs of every how manieth block are kept; None for none.
        keep_decoded: Bytes of decoded levels that are kept.
        entries: Bytes of the bank's single-knob entries, by their file.
    """

    parts: Mapping[str, int]
    capacity: int
    narrow: frozenset[str]
    state_stride: int | None
    keep_decoded: int
    entries: Mapping[Path, int]

    @property
    def memory_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bank_bytes(self) -> int:
        return sum(self.entries.values())

    @property
    def missing_bytes(self) -> int:
        """Of the entries that are still to be built, as of now."""
        return sum(size for path, size in self.entries.items() if not path.exists())


def footprint_of(
    setup: EvaluationSetup,
    facts: ModelFacts,
    model: nn.Module,
    structure: Structure,
    space: SearchSpace,
    knobs: Mapping[str, Knob],
    passages: Mapping[Split, Passages],
    device: torch.device,
    tuning: Passages | None = None,
    *,
    judged: bool = True,
) -> Footprint:
    """The footprint of a runner of this setup.

    Args:
        setup: Names the bank and what may be held.
        facts: Of the model's files.
        model: On the meta device.
        structure: Its sites.
        space: The search space.
        knobs: By name.
        passages: Both splits.
        device: Where it runs.
        tuning: What adapters are trained on.
        judged: Whether memory is that of this machine; else there is enough.

    Raises:
        InputError: Memory cannot do; one line with what would make it fit.
    """
    needs = {need for knob in knobs.values() for need in knob.needs}
    # gradients have the dtype of their parameters, and float16 has no room for theirs
    goes_back = "gradient" in needs or tuning is not None
    narrow = narrow_names(model, structure.linears) if keeps_narrow(facts, device) and not goes_back else frozenset()
    width = 2 if narrow else compute_dtype(facts, device).itemsize
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    steps = list(steps_of(structure, space, knobs))
    search = len(passages["search"].inputs) * passages["search"].length
    valued = [step for step in steps if step.knob.of_values]
    shaped = {linear.name: linear for step in valued for linear in step.site.linears}
    in_force = width * sum(linear.parameters for linear in shaped.values())
    of_values = {step.knob.name for step in valued}
    every_level = width * sum(step.site.parameters for step in valued)
    fixed = {
        "process": _PROCESS_BYTES if device.type == "cpu" else 0,
        "weights": _weight_bytes(facts, model, narrow, device),
        "teacher": 4 * sum(_targets(p, hidden, decoder=facts.task == "decoder") for p in passages.values()),
        "statistics": _statistics_bytes(structure, steps, needs),
        "working": _working_bytes(structure, model, narrow, steps, hidden)
        + ("gradient" in needs) * _activation_bytes(structure, hidden, passages["search"].length),
    }
    if tuning is not None:
        fixed["training"] = _training_bytes(structure, model, space, knobs, hidden, tuning.length)
    capacity = _capacity(setup, device) if judged else _ENOUGH
    left = capacity - sum(fixed.values()) - in_force
    if left < 0:
        raise InputError(_too_much({**fixed, "levels in force": in_force}, capacity, facts, device))
    left = max(0, left - int(_MARGIN * capacity) - int(_HEAP_SHARE * in_force))
    stride = state_stride(len(structure.blocks), search, hidden, min(_KEEP_STATES_BYTES, left))
    states = 0 if stride is None else state_bytes((len(structure.blocks) - 1) // stride, search, hidden)
    keep = min(_KEEP_DECODED_BYTES, in_force + int((left - states) / (1 + _HEAP_SHARE)))
    kept = max(keep, in_force) if len(of_values) > 1 else min(every_level, max(keep, in_force))
    bank = Bank(Path(setup.bank), facts.digest, {}, lambda name: torch.empty(0), lambda tensor: tensor, 0)
    bank.statistics = Statistics(passages["search"].calibration.digest, {})
    return Footprint(
        parts={**fixed, "states": states, "levels": kept + int(_HEAP_SHARE * kept if device.type == "cpu" else 0)},
        capacity=capacity,
        narrow=narrow,
        state_stride=stride,
        keep_decoded=keep,
        entries={path: entry_bytes(step) + _FILE_BYTES for path, step in bank.files(steps).items()},
    )


def steps_of(structure: Structure, space: SearchSpace, knobs: Mapping[str, Knob]) -> Iterator[Step]:
    """Every level other than the dense one that something is built for, alone: what the bank builds ahead."""
    sites = {site.name: site for site in structure.sites}
    for decision in space.decisions:
        if knobs[decision.knob].of_values or knobs[decision.knob].applies_built:
            yield from (Step(knobs[decision.knob], sites[decision.site], level) for level in decision.levels[1:])


def _weight_bytes(facts: ModelFacts, model: nn.Module, narrow: frozenset[str], device: torch.device) -> int:
    width = compute_dtype(facts, device).itemsize
    return sum(p.numel() * (2 if name in narrow else width) for name, p in model.named_parameters()) + 4 * scratch_elements(model, narrow)


def _targets(passages: Passages, hidden: int, *, decoder: bool) -> int:
    """Numbers kept of the dense model: a vector and a score a token, or a vector a sentence."""
    return len(passages.inputs) * (passages.length * (hidden + 1) if decoder else hidden)


def _statistics_bytes(structure: Structure, steps: Collection[Step], needs: Collection[str]) -> int:
    """A float32 matrix, or vector, for every tensor that linears are fed, and a gradient as large as each weight whose knob asks.

    Experts are not watched, but for what is kept of some tokens.
    """
    widths = [site.linears[0].in_features for site in structure.sites if site.kind == "linears" and not site.linears[0].experts]
    asking = {linear.name: linear for step in steps if "gradient" in step.knob.needs for linear in step.site.linears}
    of_inputs = sum(4 * k * (k * ("hessian" in needs) + ("input_norm" in needs)) for k in widths)
    sampled = {(step.site.name, need): step.site for step in steps for need in step.knob.needs & SAMPLES}
    of_tokens = sum(4 * MOST_TOKENS * max(max(i.in_features, i.out_features) for i in site.linears) for site in sampled.values())
    divided = {step.site.name: step.site.linears for step in steps if "amounts" in step.knob.needs}
    of_neurons = sum(4 * (i[0].in_features + 1) * (i[0].in_features + 1 + i[-1].in_features) for i in divided.values())
    return of_inputs + of_tokens + of_neurons + 4 * sum(linear.parameters for linear in asking.values() if not linear.experts)


def _activation_bytes(structure: Structure, hidden: int, length: int) -> int:
    """What a backward pass over one window keeps of the forward pass."""
    return 4 * length * sum(2 * linear.out_features for linear in structure.linears) + 4 * length * 8 * hidden * len(structure.blocks)


def _training_bytes(structure: Structure, model: nn.Module, space: SearchSpace, knobs: Mapping[str, Knob], hidden: int, length: int) -> int:
    """Adapters with their gradients and two moments, and what a step keeps of its forward pass and of the logits."""
    rows = length * next(knob.batch for knob in knobs.values() if isinstance(knob, LoraRank))
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)  # type: ignore[operator]
    return 16 * space.dense["trainable_parameters"] + _activation_bytes(structure, hidden, rows) + 12 * rows * vocabulary


def _working_bytes(structure: Structure, model: nn.Module, narrow: frozenset[str], steps: list[Step], hidden: int) -> int:
    """The most that a batch, the head or the building of an entry takes for a moment."""
    outputs = [[linear.out_features for linear in site.linears] for site in structure.sites if site.kind in ("attention", "ffn")]
    forward = 4 * BATCH_TOKENS * (max(sum(sizes) + max(sizes) for sizes in outputs) + 4 * hidden)
    head = 3 * 4 * CHUNK_LOGITS + (4 * CHUNK_ROWS * hidden if narrow else 0) + 4 * BATCH_TOKENS * hidden
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)  # type: ignore[operator]
    largest = max((linear.parameters for step in steps for linear in step.site.linears), default=0)
    widest = max((linear.in_features for step in steps if "hessian" in step.knob.needs for linear in step.site.linears), default=0)
    building = _BUILD_BYTES_PER_WEIGHT * largest + _SECOND_ORDER_BYTES * widest**2
    return max(forward, head if vocabulary > CHUNK_ROWS else head // 4, building)


def _capacity(setup: EvaluationSetup, device: torch.device) -> int:
    """Bytes that a runner may hold on its device; the cap is of a process, and not of a GPU."""
    there = memory_of(device)
    return there if device.type == "cuda" or setup.memory_bytes is None else min(there, setup.memory_bytes)


def _too_much(parts: Mapping[str, int], capacity: int, facts: ModelFacts, device: torch.device) -> str:
    greatest = max(parts, key=lambda name: parts[name])
    remedy = {
        "statistics": "choose methods that need no hessian or gradient, such as bits.quantizer=rtn or sparsity.criterion=wanda",
        "teacher": "take fewer --windows",
    }.get(greatest, "use a smaller model or a machine with more memory")
    named = ", ".join(f"{size / 1e9:.1f} {name}" for name, size in sorted(parts.items(), key=lambda item: -item[1]) if size >= 5e7)
    return (
        f"{facts.path} needs {sum(parts.values()) / 1e9:.1f} GB on {device} ({named}), {capacity / 1e9:.1f} GB are allowed; {remedy}, "
        f"or raise AUTOEFF_MEMORY_CAP_BYTES if it is set"
    )


def check_disk(footprint: Footprint, folder: Path, knobs: Mapping[str, Knob]) -> None:
    """Raises InputError where the entries that are still to be built do not fit on the disk of the bank's folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if footprint.bank_bytes > free and (needed := footprint.missing_bytes) > free:
        nested = "set bits.store=nested (a third of the bytes), " if getattr(knobs.get("bits"), "store", None) == "separate" else ""
        raise InputError(
            f"the level bank needs {needed / 1e9:.1f} GB more at {folder}, {free / 1e9:.1f} GB are free; "
            f"{nested}allow fewer levels, or set AUTOEFF_HOME to a larger disk"
        )
