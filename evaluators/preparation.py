"""What can be known of a job before any weight is loaded: sites, space, exact costs, windows of text, digests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autoeff.errors import InputError
from autoeff.evaluators.footprint import Footprint, check_disk, footprint_of
from autoeff.evaluators.ground import ground_of
from autoeff.evaluators.images import make_images
from autoeff.evaluators.keeping import Keep, anew
from autoeff.evaluators.latency import Latency, latency_of
from autoeff.evaluators.loading import ModelFacts, check_memory, load_tokenizer, resolve_model
from autoeff.evaluators.metrics import check_metrics
from autoeff.evaluators.setup import EVALUATOR_VERSION, EvaluationSetup
from autoeff.evaluators.tasks import check_tasks
from autoeff.evaluators.text import Passages, make_passages, make_windows
from autoeff.spaces.build import build_space
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.knob import Knob
from autoeff.spaces.measurements import Split
from autoeff.spaces.sites import Structure
from autoeff.spaces.space import SearchSpace
from autoeff.spaces.units import UnitKnob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Preparation", "device_of", "prepare"]

_CALIBRATED = 4  # times the search text: a pass more, and an X^T X of so many tokens is far from singular in usual widths


@dataclass(frozen=True)
class Preparation:
    """A job's preflight.

    Attributes:
        facts: Of the model's files.
        structure: Blocks and sites.
        space: Decisions with exact costs.
        knobs: By name.
        passages: Search and held-out text.
        left_out: Sublayers whose units cannot be cut, and why.
        footprint: Predicted use of memory and disk.
        seconds: How long finding all this took.
        digest: Names everything that a quality value depends on besides configuration, split and windows.
        tuning: Text that adapters are trained on, where there are any.
        latency: Times of the space's levels, where they are asked for; quality does not depend on them.
    """

    facts: ModelFacts
    structure: Structure
    space: SearchSpace
    knobs: Mapping[str, Knob]
    passages: Mapping[Split, Passages]
    device: torch.device
    left_out: Mapping[str, str]
    footprint: Footprint
    seconds: float
    digest: str
    latency: Latency | None = None
    tuning: Passages | None = None

    @property
    def quality(self) -> str:
        """The search objective's measurement name."""
        return "kl" if self.facts.task == "decoder" else "damage_cosine"

    @property
    def calibration(self) -> Passages | None:
        """What statistics are of: other text than is searched on, to which levels that are fitted to them would else be fitted, too.

        The search text where its source has too little beside it; None where no knob needs statistics.
        """
        return self.passages["search"].calibration if any(knob.needs for knob in self.knobs.values()) else None

    @property
    def generates(self) -> bool:
        """Whether quality is that of text generated behind a prompt: where caches are decided about, all candidates are compared so."""
        return any(knob.kind == "cache" for knob in self.knobs.values())

    @property
    def notices(self) -> list[str]:
        """What the user must be told once."""
        sublayers = {knob.sublayer for knob in self.knobs.values() if isinstance(knob, UnitKnob)}
        whole = [site.name for site in self.structure.sites if site.kind in sublayers and site.name in self.left_out]
        kept = [f"{whole[0]} keeps all its units ({len(whole)} sublayers in all do): {self.left_out[whole[0]]}"] if whole else []
        context = next((site.kv.context for site in self.structure.sites if site.kv is not None), 0)
        length = self.passages["search"].length
        if self.generates and context != length:
            kept.append(
                f"budgets of the cache cost what they cost at {context} tokens, and are measured on windows of {length} at the same shares"
            )
        times = () if self.latency is None else self.latency.notices
        if self.calibration is self.passages["search"]:
            kept.append(
                f"levels are fitted to the search text itself, beside which {self.calibration.source} holds too little; "
                "quality on it flatters them, more text or fewer windows do not"
            )
        if self.tuning is not None:
            kept += ["dense is the model with the adapter trained in full: quality is the distance from it", *self.tuning.notices]
        return [*self.facts.notices, *kept, *(n for p in self.passages.values() for n in p.notices), *times]

    def report(self) -> dict[str, Any]:
        """The preflight as plain data, stored with the job."""
        return {
            "model": {
                "path": str(self.facts.path), "model_type": self.facts.model_type, "task": self.facts.task, "digest": self.facts.digest,
                "parameters": self.facts.parameters, "blocks": len(self.structure.blocks), "context": self.facts.context,
            },
            "text": {
                split: {"digest": p.digest, "source": p.source, "windows": len(p.inputs), "length": p.length, "tokens": p.tokens}
                for split, p in [*self.passages.items(), ("calibration", self.calibration), ("tune", self.tuning)]
                if p is not None
            },
            "quality": self.quality,
            "decisions": len(self.space.decisions),
            "configurations": str(self.space.size),
            "memory_bytes": self.footprint.memory_bytes,
            "memory_parts": dict(self.footprint.parts),
            "bank_bytes": self.footprint.bank_bytes,
            "bank_missing_bytes": self.footprint.missing_bytes,
            "hardware": hardware_name(self.device),
            "torch": torch.__version__,
            "evaluator": EVALUATOR_VERSION,
            "notices": self.notices,
            **({} if self.latency is None else {"latency": self.latency.report()}),
        }  # fmt: skip


def prepare(setup: EvaluationSetup, *, elsewhere: bool = False, keep: Keep = anew) -> Preparation:
    """Reads headers, config and text; loads no weights.

    Args:
        setup: What is to be evaluated.
        elsewhere: For machines other than this one, which need not have the device; then its memory is theirs to judge.
        keep: May know what jobs of other texts or seeds share.

    Raises:
        InputError: Anything wrong with the model, the text, the knobs or the device.
    """
    started = time.perf_counter()
    wanted = _named(setup.device)
    device = device_of("cpu" if elsewhere else setup.device)
    judged = device.type == wanted.type
    path = resolve_model(setup.model)
    key = [str(path), asdict(setup.space), setup.batch, setup.context]
    found = keep("ground", key, [path], lambda: ground_of(path, setup.space, setup.batch, setup.context))
    if judged:
        check_memory(found.facts, device)
    facts, structure, space, knobs = found.facts, found.structure, found.space, found.knobs
    trained = sorted(name for name, knob in knobs.items() if knob.kind == "trained")
    setup, tuning = _tuning(facts, setup, trained, keep)
    latency = None
    if setup.latency is not None:
        latency = latency_of(setup.latency, facts, structure, setup.space, device)
        space, _ = build_space(structure, setup.space, latency.further, latency.dense)
    if setup.tasks is not None and facts.task != "decoder":
        raise InputError(f"tasks {', '.join(setup.tasks.names)} are for decoders, which {facts.path} is not")
    asked = {} if setup.tasks is None else {"tasks": check_tasks(setup.tasks)}
    if setup.metrics:
        asked["metrics"] = check_metrics(setup.metrics)
    calibrated = any(knob.needs for knob in knobs.values())
    passages = _passages(facts, setup, keep, calibrated=calibrated)
    if tuning is not None:  # what the bank is told of inputs is said of the tuned model
        levels = [d.levels for d in space.decisions if d.knob in trained]
        about = [tuning.digest, setup.seed, [knobs[name].settings() for name in trained], levels]
        search = passages["search"]
        beside = search.beside and replace(search.beside, digest=digest_of([search.beside.digest, *about]))
        passages["search"] = replace(search, digest=digest_of([search.digest, *about]), beside=beside)
    for knob in knobs.values():
        if knob.kind == "cache":
            knob.check_length(min(p.length for p in passages.values()))
    # of the texts their sizes count, and what the bank was told of one
    shapes = [None if p is None else p.inputs.shape for p in (*passages.values(), tuning)]
    key = [replace(setup, seed=0).to_json(), elsewhere, shapes, passages["search"].calibration.digest if calibrated else None]
    footprint = keep(
        "footprint",
        key,
        [facts.path],
        lambda: footprint_of(setup, facts, found.model, structure, space, knobs, passages, wanted, tuning, judged=judged),
    )
    if judged:
        check_disk(footprint, Path(setup.bank), knobs)
    digest = digest_of(
        {
            "evaluator": EVALUATOR_VERSION,
            # A server plans for GPUs that it has not, with a build of torch of its own.
            "torch": torch.__version__.partition("+")[0] if wanted.type == "cuda" else torch.__version__,
            "hardware": setup.hardware or hardware_name(device),
            **({"linears": "packed"} if wanted.type == "cuda" else {}),
            "model": facts.digest,
            "text": {split: p.digest for split, p in passages.items()},
            **({} if (beside := passages["search"].beside) is None else {"calibration": beside.digest}),
            "knobs": {name: knob.settings() for name, knob in knobs.items()},
            **asked,
        }
    )
    seconds = time.perf_counter() - started
    return Preparation(facts, structure, space, knobs, passages, device, found.left_out, footprint, seconds, digest, latency, tuning)


def _tuning(facts: ModelFacts, setup: EvaluationSetup, trained: Sequence[str], keep: Keep) -> tuple[EvaluationSetup, Passages | None]:
    """The text to train on; a setup that names no search text is searched on what is left of it.

    Raises:
        InputError: A knob that trains has no text, or the text no such knob; no decoder; a limit on times.
    """
    if not trained:
        if setup.tune_data is not None:
            raise InputError("tune_data is text that adapters are trained on; add lora_rank to the knobs, or leave it out")
        return setup, None
    if facts.task != "decoder":
        raise InputError(f"knob {trained[0]} trains adapters of decoders; {facts.path} is none")
    spec = setup.tune_data
    if spec is None or spec.source is None:
        raise InputError(f"knob {trained[0]} trains adapters and needs text to do so; give --tune-data")
    if setup.latency is not None:
        raise InputError(f"times of models with adapters are not known; search {trained[0]} without decode_ms and prefill_ms")
    if setup.data.source is None:
        setup = replace(setup, data=replace(setup.data, source=spec.source))
    spec = spec if spec.windows is not None else replace(spec, windows=0)
    shared = setup.data.source == spec.source
    return setup, make_windows(_tokenizer(facts, keep), facts, spec, setup.seed, "tune", divided=shared, tuned=shared, keep=keep)


def _passages(facts: ModelFacts, setup: EvaluationSetup, keep: Keep, *, calibrated: bool) -> dict[Split, Passages]:
    if facts.task == "vision":
        return make_images(facts, setup.data, setup.eval_data, setup.seed, spared=calibrated)
    tuned_on = None if setup.tune_data is None else setup.tune_data.source
    tokenizer, spared = _tokenizer(facts, keep), _CALIBRATED * calibrated
    return make_passages(tokenizer, facts, setup.data, setup.eval_data, setup.seed, tuned_on=tuned_on, spared=spared, keep=keep)


def _tokenizer(facts: ModelFacts, keep: Keep) -> PreTrainedTokenizerBase:
    return keep("tokenizer", [str(facts.path)], [facts.path], lambda: load_tokenizer(facts))


def device_of(name: str) -> torch.device:
    """The torch device called `name`.

    Raises:
        InputError: It is not on this machine.
    """
    device = _named(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name!r} is not on this machine, which has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not known; allowed: cpu, cuda, cuda:N")
    return device


def hardware_name(device: torch.device) -> str:
    """Device and, on a CPU, the number of threads, on which sums of floats depend."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
