"""What a runner must be told before it can evaluate: plain data that travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autoeff.evaluators.latency_table import LatencySpec
from autoeff.evaluators.tasks import TaskSpec
from autoeff.evaluators.text import TextSpec
from autoeff.spaces.build import SpaceSpec
from autoeff.spaces.configuration import Level
from autoeff.spaces.measurements import Measurement, Split

__all__ = ["EvaluationRequest", "EvaluationSetup", "measurement_from_json", "measurement_to_json"]


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
        memory_bytes: What may be held on the device; None allows all that is there.
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
