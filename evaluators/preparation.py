"""What can be known of a job before any weight is loaded: sites, space, exact costs, windows of text, digests."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from autoeff.errors import InputError
from autoeff.evaluators.footprint import Footprint, footprint_of
from autoeff.evaluators.loading import ModelFacts, check_memory, inspect_model, load_tokenizer, resolve_model, skeleton
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.evaluators.tasks import check_tasks
from autoeff.evaluators.text import Passages, make_passages
from autoeff.spaces.build import build_space
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import Knob, known_knobs
from autoeff.spaces.sites import Structure, find_structure
from autoeff.spaces.space import SearchSpace
from autoeff.spaces.units import UnitKnob

__all__ = ["EVALUATOR_VERSION", "Preparation", "device_of", "prepare"]

EVALUATOR_VERSION = 2  # raised when a value of the same key could change


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
    """

    facts: ModelFacts
    structure: Structure
    space: SearchSpace
    knobs: Mapping[str, Knob]
    passages: Mapping[Literal["search", "held_out"], Passages]
    device: torch.device
    left_out: Mapping[str, str]
    footprint: Footprint
    seconds: float
    digest: str

    @property
    def quality(self) -> str:
        """The search objective's measurement name."""
        return "kl" if self.facts.task == "decoder" else "damage_cosine"

    @property
    def notices(self) -> list[str]:
        """What the user must be told once."""
        sublayers = {knob.sublayer for knob in self.knobs.values() if isinstance(knob, UnitKnob)}
        whole = [site.name for site in self.structure.sites if site.kind in sublayers and site.name in self.left_out]
        kept = [f"{whole[0]} keeps all its units ({len(whole)} sublayers in all do): {self.left_out[whole[0]]}"] if whole else []
        return [*self.facts.notices, *kept, *(n for p in self.passages.values() for n in p.notices)]

    def report(self) -> dict[str, Any]:
        """The preflight as plain data, stored with the job."""
        return {
            "model": {
                "path": str(self.facts.path), "model_type": self.facts.model_type, "task": self.facts.task, "digest": self.facts.digest,
                "parameters": self.facts.parameters, "blocks": len(self.structure.blocks), "context": self.facts.context,
            },
            "text": {
                split: {"digest": p.digest, "source": p.source, "windows": len(p.ids), "length": p.ids.shape[1], "tokens": p.tokens}
                for split, p in self.passages.items()
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
            "notices": self.notices,
        }  # fmt: skip


def prepare(setup: EvaluationSetup) -> Preparation:
    """Reads headers, config and text; loads no weights.

    Raises:
        InputError: Anything wrong with the model, the text, the knobs or the device.
    """
    started = time.perf_counter()
    device = device_of(setup.device)
    facts = inspect_model(resolve_model(setup.model))
    check_memory(facts, device)
    model = skeleton(facts)
    structure = find_structure(model, untie=setup.space.untie)
    left_out: Mapping[str, str] = {}
    if any(knob.coupled for name, knob in known_knobs().items() if name in setup.space.knobs):
        structure, left_out = coupled(model, structure)
    space, knobs = build_space(structure, setup.space)
    if setup.tasks is not None and facts.task == "encoder":
        raise InputError(f"tasks {', '.join(setup.tasks.names)} are for decoders; {facts.path} is an encoder")
    asked = {} if setup.tasks is None else {"tasks": check_tasks(setup.tasks)}
    tokenizer = load_tokenizer(facts)
    passages = make_passages(tokenizer, facts, setup.data, setup.eval_data, setup.seed)
    footprint = footprint_of(setup, facts, model, structure, space, knobs, passages, device)
    digest = digest_of(
        {
            "evaluator": EVALUATOR_VERSION,
            "torch": torch.__version__,
            "hardware": hardware_name(device),
            "model": facts.digest,
            "text": {split: p.digest for split, p in passages.items()},
            "knobs": {name: knob.settings() for name, knob in knobs.items()},
            **asked,
        }
    )
    return Preparation(facts, structure, space, knobs, passages, device, left_out, footprint, time.perf_counter() - started, digest)


def device_of(name: str) -> torch.device:
    """The torch device called `name`.

    Raises:
        InputError: It is not on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not known; allowed: cpu, cuda, cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name!r} is not on this machine, which has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def hardware_name(device: torch.device) -> str:
    """Device and, on a CPU, the number of threads, on which sums of floats depend."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
