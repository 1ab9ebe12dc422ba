"""Predicts how long a search will take on this machine, from a few seconds of its own work at the model's shapes.

Timed are one block of the model, one piece of the head, widening, every level of one site, and a synced write. Each is scaled by
what it is proportional to: a block by its operations, an entry by its weights (with a Hessian also by its inputs), a file by its
bytes. What else the machine does meanwhile counts in the sample as it will in the search.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.evaluators.bank import Step
from autoeff.evaluators.footprint import steps_of
from autoeff.evaluators.forward import BATCH_TOKENS, Forward, fed_to
from autoeff.evaluators.loading import one_block
from autoeff.evaluators.preparation import Preparation
from autoeff.evaluators.quality import CHUNK_ROWS
from autoeff.spaces.configuration import Level
from autoeff.spaces.kv_cache import KvPlan, KvState, continuation_start
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Linear, Site

__all__ = ["Seconds", "predict_seconds"]

_TOKENS = 512  # of the timed pass: its speed per token is that of a full batch within a few percent
_WEIGHTS = 9 << 20  # of the timed linear: its float32 values are past the 32 MiB up to which malloc hands out warm pages
_WRITTEN_BYTES = 32 << 20
_DRAWN = 64  # configurations, of whose decoding the mean is taken: levels that silence sublayers save it
_IMPORTS_S = 6.0  # of a new process
_SHARE = 0.25  # of the context, kept by the cache whose rounds are timed


@dataclass(frozen=True)
class Seconds:
    """Predicted wall time.

    Attributes:
        opening: Start of a runner: the process, and the dense model over the search text and that of the statistics.
        bank: Building and writing the entries that are missing.
        evaluation: One configuration with a random level everywhere, over the whole search text, without reuse.
    """

    opening: float
    bank: float
    evaluation: float

    def search(self, trials: float) -> float:
        """Of a whole search: an upper bound, since candidates share what they have in common."""
        return self.opening + self.bank + trials * self.evaluation


def predict_seconds(preparation: Preparation, bank: Path) -> Seconds:
    """Times samples of the work that a search will do; takes some seconds.

    Args:
        preparation: The job's preflight.
        bank: Folder of the level bank.
    """
    facts, structure = preparation.facts, preparation.structure
    tokens = preparation.passages["search"].tokens
    linears = structure.linears
    body = tokens * sum(linear.parameters_per_token for linear in linears) * _body_s(preparation)
    if preparation.footprint.narrow:
        batches = -(-tokens // BATCH_TOKENS)
        body += batches * (sum(linear.parameters for linear in linears) + structure.head_parameters) * _widening_s(facts.store_dtype)
    head = tokens * structure.head_parameters * _head_s(preparation) if facts.task == "decoder" else 0.0
    built, decoding_s = 0.0, dict[tuple[str, Level], float]()
    # what is found for levels that act on the model takes little of it
    steps = [step for step in steps_of(structure, preparation.space, preparation.knobs) if not step.knob.applies_built]
    samples = {kind: _level_s(step, linear, facts.store_dtype) for kind, (step, linear) in _largest(steps).items()}
    for step in steps:
        building, decoding = samples[_kind(step)]
        if step.level == step.knob.stored_level(step.site, step.level):
            built += building * sum(_work(step, linear) for linear in step.site.linears)
        decoding_s[f"{step.site.name}:{step.knob.name}", step.level] = decoding * step.site.parameters
    rng, space = random.Random(0), preparation.space
    drawn = [space.at(space.sample(rng)).levels for _ in range(_DRAWN)]
    decoded = sum(decoding_s.get(taken, 0.0) for levels in drawn for taken in levels.items()) / _DRAWN
    calibrated = 0 if preparation.calibration is None else preparation.calibration.tokens / tokens
    missing = preparation.footprint.missing_bytes
    part = missing / max(1, preparation.footprint.bank_bytes)
    return Seconds(
        opening=_IMPORTS_S + preparation.seconds + body * (1 + calibrated) + 2 * head,
        bank=built * part + (missing * _write_s(bank) if missing else 0.0),
        evaluation=body + head + decoded + (_rounds_s(preparation) if preparation.generates else 0.0),
    )


@torch.no_grad()
def _rounds_s(preparation: Preparation) -> float:
    """Seconds of attention in rounds over the whole search text, in every layer whose cache can be decided about; sampled on one batch."""
    passages, device = preparation.passages["search"], preparation.device
    sites = [site for site in preparation.structure.sites if site.kind == "attention" and site.kv is not None]
    batches = Forward.batches(len(passages.inputs), passages.tokens)
    site = sites[0]
    assert site.kv is not None
    output = next(linear for linear in site.linears if linear.name == site.output)
    shape = batches[0].stop, output.in_features // site.kv.value_size, passages.length
    query = torch.randn(*shape, site.kv.key_size, device=device)
    key, value = (torch.randn(shape[0], site.kv_heads, shape[2], size, device=device) for size in (site.kv.key_size, site.kv.value_size))
    start = continuation_start(passages.length)
    prompt, rest = slice(0, start), slice(start, None)

    def rounds() -> None:
        state = KvState(KvPlan(_SHARE), passages.length)
        state.prefill(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], 1.0)
        state.decode(query[:, :, rest], key[:, :, rest], value[:, :, rest], 1.0)

    return _mean_s(rounds, device, 1) * len(batches) * len(sites)


def _kind(step: Step) -> tuple[str, object]:
    return step.knob.name, step.level


def _largest(steps: Sequence[Step]) -> dict[tuple[str, object], tuple[Step, Linear]]:
    """For every kind of level the largest linear that takes it."""
    found: dict[tuple[str, object], tuple[Step, Linear]] = {}
    for step in steps:
        linear = max(step.site.linears, key=lambda item: item.parameters)
        if _kind(step) not in found or linear.parameters > found[_kind(step)][1].parameters:
            found[_kind(step)] = (step, linear)
    return found


def _mean_s(work: Callable[[], object], device: torch.device, times: int = 2, *, warm: bool = True) -> float:
    """Seconds of a call, on average; the first one does not count where `warm`."""
    if warm:
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / times


@torch.no_grad()
def _body_s(preparation: Preparation) -> float:
    """Seconds per token and weight of the linears, attention and all else included."""
    device = preparation.device
    model: Any = one_block(preparation.facts, device)
    passages = preparation.passages["search"]
    rows = max(1, min(len(passages.inputs), _TOKENS // passages.length))
    arguments = {model.main_input_name: fed_to(model, passages.inputs[:rows].to(device))}
    if passages.mask is not None:
        arguments["attention_mask"] = passages.mask[:rows].to(device)
    body = getattr(model, "base_model", model)
    counted = rows * passages.length if passages.mask is None else int(passages.mask[:rows].sum())
    weights = sum(linear.parameters_per_token for linear in preparation.structure.linears if linear.name.startswith(_first(preparation)))
    return _mean_s(lambda: body(**arguments), device) / counted / max(1, weights)


def _first(preparation: Preparation) -> str:
    return preparation.structure.blocks[0] + "."


@torch.no_grad()
def _head_s(preparation: Preparation) -> float:
    """Seconds per token and weight of the head."""
    device, vocabulary = preparation.device, preparation.facts.vocabulary
    rows, hidden = min(CHUNK_ROWS, vocabulary), preparation.structure.head_parameters // vocabulary
    weight = torch.full((rows, hidden), 0.01, device=device)
    states = torch.full((_TOKENS, hidden), 0.01, device=device)
    return _mean_s(lambda: torch.logsumexp(nn.functional.linear(states, weight), -1), device) / _TOKENS / weight.numel()


def _widening_s(dtype: torch.dtype) -> float:
    """Seconds per weight."""
    stored, wide = torch.zeros(1 << 23, dtype=dtype), torch.zeros(1 << 23)
    return _mean_s(lambda: wide.copy_(stored), torch.device("cpu")) / stored.numel()


def _level_s(step: Step, largest: Linear, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds to build a level, per unit of `_work`, and to decode it, per weight; measured on some rows of its largest linear."""
    if step.knob.kind == "structure":
        return 0.0, 0.0
    k = largest.in_features
    linear = replace(largest, out_features=min(-(-_WEIGHTS // k), largest.rows), experts=0)
    site = Site("sample", step.site.kind, 0, (linear,))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(linear.out_features, linear.in_features, generator=generator).mul_(0.02).to(dtype)
    statistics: dict[str, Tensor] = {}
    if "input_norm" in step.knob.needs:
        statistics[f"{linear.name}.input_norm"] = torch.ones(linear.in_features)
    if "hessian" in step.knob.needs:
        statistics[f"{linear.name}.hessian"] = torch.eye(linear.in_features)
    if "gradient" in step.knob.needs:
        statistics[f"{linear.name}.gradient"] = torch.ones(weight.shape)
    material = Material({linear.name: weight}, statistics=statistics)
    stored = step.knob.stored_level(step.site, step.level)
    started = time.perf_counter()
    entry = step.knob.build(site, stored, material)
    building = (time.perf_counter() - started) / _work(step, linear)

    def decode() -> None:
        step.knob.transform(site, step.level, step.knob.derived(site, step.level, entry), material)

    return building, _mean_s(decode, torch.device("cpu"), 1, warm=False) / linear.parameters


def _work(step: Step, linear: Linear) -> int:
    """What the time to build is proportional to: weights, or with a Hessian weights and rows of its factors times inputs."""
    k = linear.in_features
    return (linear.rows + k) * k * k if "hessian" in step.knob.needs else linear.parameters


def _write_s(folder: Path) -> float:
    """Seconds per byte of a new file, synced."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    data = random.Random(0).randbytes(_WRITTEN_BYTES)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return (time.perf_counter() - started) / len(data)
