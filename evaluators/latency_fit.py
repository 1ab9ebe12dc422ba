"""Measures what a latency table lacks: operations on their own, then whole models, to which the constants of a composition are fitted."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from autoeff.errors import InputError
from autoeff.evaluators.latency_costs import FACTORS, SUBLAYERS, UNFITTED, Composer, Operations, further, kind_of
from autoeff.evaluators.latency_table import PHASES, Entry, Fit, LatencyTable, Operation, Phase
from autoeff.evaluators.loading import ModelFacts, keeps_narrow, random_model
from autoeff.evaluators.serving import Arbitrary, Form, PackedLinear, copied, decoding, forms, prefilling, removable, serve, served
from autoeff.evaluators.setup import LatencySpec
from autoeff.kernels import linear_wq
from autoeff.kernels.failures import of_device
from autoeff.kernels.timing import Timing, measure
from autoeff.spaces.build import build_space
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.sites import Linear, Structure
from autoeff.spaces.space import SpaceSpec

__all__ = ["Row", "TimedModel", "fitted", "measured", "runtime_dtype", "solved", "step_of", "timed"]

_ROUNDS = 15
_TOGETHER = 12  # operations that alternate
_OPERANDS_BYTES = 512 << 20
_ROTATED_BYTES = 64 << 20  # beyond the last-level cache that a few cores share
_COPIES = 16
_CALIBRATED_BYTES = 512 << 20  # of blocks; more of them tell nothing new
_CALIBRATED_AT_ONCE = 4  # variants beside the dense model, which anchors them
_SECONDS = 10.0  # of calls that alternate, about; rounds are cut down to 5 for it
_TURN_S = 0.01
_RANDOM_CONFIGURATIONS = 6
_RIDGE = 1e-3  # towards factors of 1, where too little varies to tell
_FACTOR_RANGE = (0.25, 4.0)  # of an operation in a model to one on its own: caches, threads
_REWEIGHTED, _USUAL_ERROR = 8, 0.02  # rounds, and the relative error from which on a row counts less


def runtime_dtype(facts: ModelFacts, device: torch.device) -> torch.dtype:
    """In which a served model computes: on a CPU float32 as its candidates, bfloat16 where their float32 copy would be too large."""
    if device.type == "cuda":
        return facts.store_dtype
    return torch.bfloat16 if keeps_narrow(facts, device) else torch.float32


class TimedModel:
    """What is timed for a job."""

    def __init__(self, facts: ModelFacts, structure: Structure, space_spec: SpaceSpec, device: torch.device, spec: LatencySpec) -> None:
        self.facts, self.structure, self.device, self.spec = facts, structure, device, spec
        self.dtype = runtime_dtype(facts, device)
        self.phases = tuple(phase for phase in PHASES if phase in spec.phases)
        self._space_spec = space_spec
        self.space, self.knobs = build_space(structure, space_spec)
        self._attends = any(
            self.knobs[decision.knob].kind == "structure" and site.kind == "attention" and decision.branches[i] not in (0, None)
            for decision in self.space.decisions
            for site in structure.sites
            if site.name == decision.site
            for i in range(len(decision.levels))
        )
        held = sum(linear.parameters for linear in structure.linears) * self.dtype.itemsize
        self._rotated = 0 if device.type == "cuda" else 1 << (min(held, _ROTATED_BYTES) - 1).bit_length()

    def composer(self, phase: Phase, fit: Fit, times: Callable[[Operation], float]) -> Composer:
        causal = self.facts.task == "decoder"
        operations = Operations(phase, self.spec, self.device, self.dtype, self._rotated, attends=self._attends, causal=causal)
        return Composer(phase, fit, self.structure, operations, times)

    def operations(self) -> set[Operation]:
        """Every operation that a level in any company needs."""
        found: set[Operation] = set()

        def times(operation: Operation) -> float:
            found.add(operation)
            return 0.0

        composers = [self.composer(phase, UNFITTED, times) for phase in self.phases]
        build_space(self.structure, self._space_spec, partial(further, composers))
        return found

    def key(self, phase: Phase) -> str:
        """Names what a fit depends on besides the device."""
        about = [self.facts.model_type, dict(self.facts.config), str(self.dtype), phase, self.spec.batch, self.spec.tokens, self._rotated]
        return digest_of([*about, {name: knob.settings() for name, knob in self.knobs.items()}, self.space.digest])


def measured(table: LatencyTable, needed: Collection[Operation], device: torch.device) -> Iterator[LatencyTable]:
    """The table with more and more of the missing entries."""
    missing = sorted((o for o in needed if o.key not in table.entries), key=lambda o: o.key)
    random.Random(0).shuffle(missing)  # a slow moment of the machine meets a bit of everything
    while missing:
        calls: dict[str, Callable[[], object]] = {}
        held = 0
        while missing and len(calls) < _TOGETHER and held < _OPERANDS_BYTES:
            operation = missing.pop()
            call, size = _call(operation, device)
            calls[operation.key] = call
            held += size
        found = {key: _entry(timing) for key, timing in timed(calls, device).items()}
        table = replace(table, entries={**table.entries, **found})
        yield table


def _entry(timing: Timing) -> Entry:
    return Entry(round(timing.median_us * 1e3), round(timing.low_us * 1e3), round(timing.high_us * 1e3), timing.rounds)


def _call(operation: Operation, device: torch.device) -> tuple[Callable[[], object], int]:
    """What is timed, and the bytes of its operands."""
    dtype = getattr(torch, operation.dtype)
    if operation.name.startswith("attention"):
        return _attending(operation, device, dtype)
    n, k, m = operation["n"], operation["k"], operation["m"]
    settings = {name: size for name, size in operation.sizes if name in ("bits", "group", "symmetric")}
    form = Form(Linear("timed", k, n, bias=False), kernel=operation.name, settings=settings)
    size = n * k * dtype.itemsize
    weights = Arbitrary()

    def module() -> nn.Module:
        if settings:
            parts = {name: part.to(device) for name, part in weights.packed(form).items()}
            planes = {name: part for name, part in parts.items() if name.startswith("plane")}
            return PackedLinear(linear_wq.Weight(planes, parts["scale"], parts.get("minimum"), settings["bits"], k, settings["group"]))
        dense = nn.Linear(k, n, bias=False, device="meta")
        dense.weight = nn.Parameter(weights.dense(form).to(device, dtype), requires_grad=False)
        return dense

    modules = [module() for _ in range(max(1, min(_COPIES, operation["rotated"] // size)))]
    x = torch.randn(1, m, k, device=device).to(dtype)
    if len(modules) == 1:
        return partial(_run, modules[0], x), size
    following = cycle(modules)
    return lambda: _run(next(following), x), size * len(modules)


@torch.inference_mode()
def _run(module: nn.Module, x: Tensor) -> object:
    return module(x)


def _attending(operation: Operation, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    batch, context, heads, kv, size = (operation[name] for name in ("batch", "context", "heads", "kv", "size"))
    decode = operation.name == "attention_decode"
    q = torch.randn(batch, heads, 1 if decode else context, size, device=device).to(dtype)
    cache = torch.randn(2, batch, kv, context - decode, size, device=device).to(dtype)
    new = torch.randn(batch, kv, 1, size, device=device).to(dtype)

    @torch.inference_mode()
    def call() -> object:
        keys, values = (torch.cat([part, new], 2) for part in cache) if decode else (cache[0], cache[1])
        return scaled_dot_product_attention(q, keys, values, is_causal=bool(operation["causal"]) and not decode, enable_gqa=heads != kv)

    return call, cache.nbytes


def timed(calls: Mapping[str, Callable[[], object]], device: torch.device, *, whole: bool = False) -> dict[str, Timing]:
    """The time of each call; all alternate. Fewer rounds where calls are slow.

    Args:
        calls: By name.
        device: Where they run.
        whole: Of whole models: on a CPU each follows itself for `_TURN_S` before the next one's turn, so that its weights are as warm
            as in a loop that decodes.
    """
    if device.type == "cuda":
        return measure(calls, device, _ROUNDS)
    once = {name: max(timing.low_us, 1.0) / 1e6 for name, timing in measure(calls, device, 2).items()}
    times = {name: max(1, round(_TURN_S / seconds)) if whole else 1 for name, seconds in once.items()}
    seconds = sum(times[name] * once[name] for name in calls)
    found = measure(
        {name: _repeated(call, times[name]) for name, call in calls.items()}, device, max(5, min(_ROUNDS, int(_SECONDS / seconds)))
    )
    return {
        name: replace(timing, **{field: getattr(timing, field) / times[name] for field in ("median_us", "low_us", "high_us")})
        for name, timing in found.items()
    }


def _repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return call if times == 1 else repeated


def step_of(phase: str, model: nn.Module, vocabulary: int, spec: LatencySpec) -> Callable[[], object]:
    """What is timed of a whole model in a phase."""
    return (decoding if phase == "decode" else prefilling)(model, vocabulary, spec.batch, spec.tokens)


# Fitting


@dataclass(frozen=True)
class Row:
    """A whole model: what constants and factors are multiplied by, and what it took."""

    label: str
    features: Mapping[str, float]
    measured_ns: float


def fitted(model: TimedModel, phase: Phase, table: LatencyTable) -> Fit:
    """Constants from whole models: dense, each knob at each level by kind of site, some at random.

    Of a large model there are only the first blocks, in two numbers.
    """
    structure, per_block = model.structure, sum(linear.parameters for linear in model.structure.linears) // len(model.structure.blocks)
    blocks = max(2, min(len(structure.blocks), _CALIBRATED_BYTES // max(1, per_block * model.dtype.itemsize)))
    alike = len({_shape_of_block(structure, i) for i in range(len(structure.blocks))}) == 1
    blocks = min(blocks, len(structure.blocks)) if alike else len(structure.blocks)
    base = random_model(model.facts, model.device, model.dtype, blocks)
    silencing = any(None in decision.branches for decision in model.space.decisions)
    whole = removable(base, structure) if silencing else frozenset[str]()
    composer = model.composer(phase, UNFITTED, lambda operation: table.entries[operation.key].median_ns)
    unserved: set[str] = set()
    rows: dict[tuple[tuple[str, float], ...], Row] = {}
    waiting: dict[str, tuple[dict[str, float], Callable[[], object]]] = {}

    def flush() -> None:
        if waiting:
            timings = timed({"dense": dense_step} | {label: step for label, (_, step) in waiting.items()}, model.device, whole=True)
            anchors.append(timings["dense"].median_us * 1e3)
            for label, (features, _) in waiting.items():
                rows[tuple(features.items())] = Row(label, features, timings[label].median_us * 1e3 / anchors[-1])
            waiting.clear()

    anchors: list[float] = []
    dense_step = step_of(phase, copied(base), model.facts.vocabulary, model.spec)
    zeros = (0,) * len(model.space.decisions)
    dense_features = _features(model, composer, zeros, blocks, whole)
    seen = {tuple(dense_features.items())}
    if blocks < len(structure.blocks):
        fewer = random_model(model.facts, model.device, model.dtype, blocks // 2)
        features = _features(model, composer, zeros, blocks // 2, whole)
        waiting["fewer blocks"] = (features, step_of(phase, fewer, model.facts.vocabulary, model.spec))
    for label, knob, indices in _variants(model, blocks, unserved):
        features = _features(model, composer, indices, blocks, whole)
        if tuple(features.items()) in seen:
            continue
        seen.add(tuple(features.items()))
        variant = copied(base)
        try:
            serve(variant, structure, model.space, model.knobs, indices, Arbitrary(), whole)
            step = step_of(phase, variant, model.facts.vocabulary, model.spec)
            step()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if of_device(error):
                raise
            if knob is None or model.knobs[knob].kind != "structure":
                raise InputError(
                    f"model_type {model.facts.model_type!r} does not run with packed linears ({error}); its {phase}_ms is not known"
                ) from None
            unserved.add(knob)
            continue
        waiting[label] = (features, step)
        if len(waiting) >= _CALIBRATED_AT_ONCE:
            flush()
    flush()
    if not anchors:  # nothing but the dense model differs in time
        anchors.append(timed({"dense": dense_step}, model.device, whole=True)["dense"].median_us * 1e3)
    anchor = sorted(anchors)[len(anchors) // 2]
    found = [Row("dense", dense_features, anchor), *(replace(row, measured_ns=row.measured_ns * anchor) for row in rows.values())]
    constants = solved(found)
    fitted = [{"label": r.label, "measured_ns": round(r.measured_ns), "fitted_ns": round(_value(constants, r.features))} for r in found]
    return Fit(constants, tuple(sorted(whole)), tuple(sorted(unserved)), tuple(fitted))


def _shape_of_block(structure: Structure, block: int) -> tuple[object, ...]:
    sites = [site for site in structure.sites if site.block == block and site.kind in SUBLAYERS]
    return tuple((site.kind, *((linear.in_features, linear.out_features, linear.experts) for linear in site.linears)) for site in sites)


def _variants(model: TimedModel, blocks: int, unserved: Collection[str]) -> Iterator[tuple[str, str | None, tuple[int, ...]]]:
    """Label, the one knob that acts, and level indices of what is measured whole; a knob that turns out not to run is left alone."""
    space, kinds = model.space, {site.name: site.kind for site in model.structure.sites}
    here = [i for i, decision in enumerate(space.decisions) if decision.block < blocks]
    for knob in dict.fromkeys(decision.knob for decision in space.decisions):
        for kind in ("linears", "attention", "ffn"):
            chosen = [i for i in here if space.decisions[i].knob == knob and kinds[space.decisions[i].site] == kind]
            for level in range(1, max((len(space.decisions[i].levels) for i in chosen), default=1)):
                if knob not in unserved:
                    indices = [0] * len(space.decisions)
                    for i in chosen:
                        indices[i] = min(level, len(space.decisions[i].levels) - 1)
                    yield f"{knob} level {level}, {kind}", knob, space.normalised(indices)
    rng = random.Random(0)
    for number in range(_RANDOM_CONFIGURATIONS):
        drawn = space.sample(rng)
        indices = [i if n in here and d.knob not in unserved else 0 for n, (d, i) in enumerate(zip(space.decisions, drawn, strict=True))]
        yield f"random {number}", None, space.normalised(indices)


def _features(model: TimedModel, composer: Composer, indices: Sequence[int], blocks: int, whole: Collection[str]) -> dict[str, float]:
    """What constants and factors are multiplied by, of the first blocks of a configuration."""
    found = {"model": 1.0, "linear": 0.0, "packed": 0.0, "attend": 0.0}
    taken = forms(model.structure, model.space, model.knobs, indices)
    for site in model.structure.sites:
        if site.block >= blocks or site.kind not in SUBLAYERS:
            continue
        forms_here = [form for linear in site.linears for form in taken[linear.name]]
        left = replace(site, linears=tuple(form.linear for form in forms_here))
        absent = site.kind in whole and all(form.silenced for form in forms_here)
        found[kind_of(site)] = found.get(kind_of(site), 0.0) + (not absent)
        found["attend"] += 0 if absent else composer.rest(left)
        for form in forms_here:
            served_as = "packed" if served(form.kernel, form.settings, form.linear, model.device) else "linear"
            found[served_as] += composer.linear(form)
    return found


def solved(rows: Sequence[Row]) -> dict[str, float]:
    """The constants that explain whole models, by least squares of relative errors, in which outliers count less.

    No constant is negative, factors stay within `_FACTOR_RANGE`. Columns that are the same in every row are left to the constant of the
    model.
    """
    names = [n for n in rows[0].features if n == "model" or len({row.features[n] for row in rows}) > 1]
    scale = sum(row.measured_ns for row in rows) / len(rows)
    unit = {name: 1.0 if name in FACTORS else scale for name in names}
    x = torch.tensor([[row.features[n] * unit[n] / row.measured_ns for n in names] for row in rows], dtype=torch.float64)
    prior = torch.tensor([float(name in FACTORS) for name in names], dtype=torch.float64)
    ridge = torch.tensor([_RIDGE if name in FACTORS else _RIDGE**2 for name in names], dtype=torch.float64)
    bounds = [_FACTOR_RANGE if name in FACTORS else (0.0, inf) for name in names]
    weight = torch.ones(len(rows), dtype=torch.float64)
    for _ in range(_REWEIGHTED):
        found = _bounded(x, weight, prior, ridge, bounds)
        weight = 1 / (x @ found - 1.0).abs().clamp(min=_USUAL_ERROR)
        weight /= weight.mean()
    return dict.fromkeys(FACTORS, 1.0) | {name: value * unit[name] for name, value in zip(names, found.tolist(), strict=True)}


def _bounded(x: Tensor, weight: Tensor, prior: Tensor, ridge: Tensor, bounds: Sequence[tuple[float, float]]) -> Tensor:
    """The values in their bounds that make `x` [rows, columns] give ones; what would leave a bound is held there, the worst first."""
    held: dict[int, float] = {}
    found = prior.clone()
    while True:
        free = [i for i in range(len(bounds)) if i not in held]
        for i, value in held.items():
            found[i] = value
        left = x[:, free] * weight[:, None]
        right = weight * (1.0 - x[:, list(held)] @ found[list(held)])
        matrix = left.T @ left + torch.diag(ridge[free])
        found[free] = torch.linalg.solve(matrix, left.T @ right + ridge[free] * prior[free])
        beyond = {i: max(bounds[i][0] - float(found[i]), float(found[i]) - bounds[i][1]) for i in free}
        worst = max(beyond, key=lambda i: beyond[i], default=None)
        if worst is None or beyond[worst] <= 0:
            return found
        held[worst] = min(max(float(found[worst]), bounds[worst][0]), bounds[worst][1])


def _value(constants: Mapping[str, float], features: Mapping[str, float]) -> float:
    return sum(constants.get(name, 0.0) * count for name, count in features.items())
