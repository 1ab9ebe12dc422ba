"""What a runner must be told before it can evaluate: plain data that travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.measurements import Measurement, Split
from autoeff.spaces.space import SpaceSpec

__all__ = [
    "EVALUATOR_VERSION",
    "EvaluationRequest",
    "EvaluationSetup",
    "LatencySpec",
    "TaskSpec",
    "TextSpec",
    "measurement_from_json",
    "measurement_to_json",
]

EVALUATOR_VERSION = 3
"""Raised when a value of the same key could change."""


@dataclass(frozen=True)
class TextSpec:
    """Which text, and how it is cut.

    Attributes:
        source: A text file, a directory, JSONL, a CSV of scored pairs (encoders), `package:NAME`, parquet or arrow files or
            `hub:OWNER/NAME` (`dataset`), rows of the last two also as conversations; None for a bundled model's own. For models of
            images a folder of them, one per label or flat (`images`).
        windows: Windows (decoders), sentences (encoders) or images; 0 takes all; None takes 16 windows (all with `per_document`), 256
            sentences or images, or every held-out pair.
        length: Tokens per window, BOS included; None takes 512 (sentences are cut at 128), or the model's context if shorter.
        bos: `per_window` puts a BOS in front of each window of the plain encoding; `per_document` in front of each document
            (divided by lines `<|endoftext|>`), whose ids are then cut into windows. A conversation is a document, and its ids are
            those that the chat template gives: with `per_document` untouched, with `per_window` without the BOS in front.
        draw: `random` draws windows that do not overlap by the seed; `first` takes them from the start; or where the search
            windows start, in ids (sentences: which ones). A held-out part of the same source is then drawn at random.
    """

    source: str | None = None
    windows: int | None = None
    length: int | None = None
    bos: Literal["per_window", "per_document"] = "per_window"
    draw: Literal["random", "first"] | tuple[int, ...] = "random"

    def __post_init__(self) -> None:
        if self.windows is not None and self.windows < 0:
            raise InputError(f"windows must be at least 1, or 0 for all: {self.windows}")
        if self.length is not None and self.length < 2:
            raise InputError(f"length must be at least 2 tokens: {self.length}")
        if self.bos not in ("per_window", "per_document"):
            raise InputError(f"bos must be per_window or per_document: {self.bos!r}")
        starts = self.draw if isinstance(self.draw, tuple) else ()
        if self.draw not in ("random", "first") and (not starts or not all(type(start) is int and start >= 0 for start in starts)):
            raise InputError(f"draw must be random, first, or a list of window starts: {self.draw!r}")


@dataclass(frozen=True)
class TaskSpec:
    """Which tasks.

    Attributes:
        names: Tasks or groups that lm-eval knows, or that stand in `path`.
        path: Folder of task files of one's own.
        documents: How many of each task's are asked, from the first on; None asks all.
    """

    names: tuple[str, ...]
    path: str | None = None
    documents: int | None = None


@dataclass(frozen=True)
class LatencySpec:
    """What times are asked for.

    Attributes:
        phases: `decode`, `prefill` or both.
        batch: Sequences at once.
        context: Tokens in the cache after a decoding step, and of a prompt; None takes the model's context.
        folder: Of the tables.
        target: A GPU of `GPUS` that is not here; None for the job's own device.
    """

    phases: tuple[str, ...]
    batch: int
    context: int | None
    folder: str
    target: str | None = None

    @property
    def tokens(self) -> int:
        """The context, once it is known."""
        assert self.context is not None
        return self.context

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatencySpec:
        return cls(**{**value, "phases": tuple(value["phases"])})


@dataclass(frozen=True)
class EvaluationSetup:
    """Everything that fixes what an evaluation means.

    Attributes:
        model: Directory, bundled name or hub id.
        data: Search text.
        eval_data: Held-out text; None takes the last fifth of `data`.
        space: Knobs and their settings.
        seed: Draws the windows.
        device: `cpu`, `cuda` or `cuda:N`.
        bank: Folder of the level bank.
        memory_bytes: What the process may hold in memory, of a job on a CPU; None allows all that is there.
        tasks: What is asked besides the whole held-out text.
        tune_data: Text on which adapters are trained.
        metrics: What is called besides, as `package.module:function`.
        context: Tokens that budgets of the cache are shares of; None takes the model's context.
        batch: Sequences decoded together: more of them read more experts.
        latency: Which times are costs; None for none. No quality depends on it.
        hardware: Machines whose values count as equal, by the queue that they work for; None stands for this machine alone.
    """

    model: str
    data: TextSpec
    eval_data: TextSpec | None
    space: SpaceSpec
    seed: int
    device: str
    bank: str
    tasks: TaskSpec | None = None
    memory_bytes: int | None = None
    context: int | None = None
    batch: int = 1
    tune_data: TextSpec | None = None
    latency: LatencySpec | None = None
    hardware: str | None = None
    metrics: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EvaluationSetup:
        fields = dict(value)
        for name in ("data", "eval_data", "tune_data"):
            if fields.get(name) is not None:
                draw = fields[name]["draw"]
                fields[name] = TextSpec(**{**fields[name], "draw": tuple(draw) if isinstance(draw, list) else draw})
        space = fields["space"]
        fields["space"] = SpaceSpec(**{**space, "include": tuple(space["include"]), "exclude": tuple(space["exclude"])})
        if fields.get("tasks") is not None:
            fields["tasks"] = TaskSpec(**{**fields["tasks"], "names": tuple(fields["tasks"]["names"])})
        fields["metrics"] = tuple(fields.get("metrics", ()))
        if fields.get("latency") is not None:
            fields["latency"] = LatencySpec.from_json(fields["latency"])
        return cls(**fields)


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation.

    Attributes:
        levels: A level for every decision.
        split: On which text.
        windows: How many of the split's windows (sentences), from the first on: the fidelity.
    """

    levels: Mapping[str, Level]
    split: Split
    windows: int


def measurement_to_json(item: Measurement) -> dict[str, Any]:
    """Every field; inverse of `measurement_from_json`."""
    return asdict(item)


def measurement_from_json(value: Mapping[str, Any]) -> Measurement:
    """The measurement that a runner sent."""
    return Measurement(**value)
