"""The one description of a job, for the command line, YAML, JSON, Python and REST alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from autoeff.errors import InputError
from autoeff.evaluators.setup import EvaluationSetup, TaskSpec, TextSpec
from autoeff.spaces.configuration import Level
from autoeff.spaces.space import SpaceSpec

__all__ = ["Budget", "Data", "JobSpec", "Space", "Tasks"]

_FILE_CHARACTERS = 256 * 1024
_FILE_DEPTH = 32
_SHOWN_CHARACTERS = 80
_OPENING = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Strict):
    """Text to search or judge on."""

    source: str | None = Field(default=None, description="File, directory, JSONL, parquet, CSV of pairs, package:NAME, hub:OWNER/NAME.")
    windows: int | None = Field(default=None, ge=0, description="Windows of text (sentences for encoders); 0 takes all.")
    length: int | None = Field(default=None, ge=2, description="Tokens per window; default min(512, the model's context).")
    bos: Literal["per_window", "per_document"] = Field(default="per_window", description="Where a BOS token is put.")
    draw: Literal["random", "first"] | tuple[int, ...] = Field(default="random", description="How windows are chosen; or their starts.")

    def text(self) -> TextSpec:
        return TextSpec(self.source, self.windows, self.length, self.bos, self.draw)


class Space(_Strict):
    """Which decisions there are."""

    include: tuple[str, ...] = Field(default=("*",), description="Globs over site:knob.")
    exclude: tuple[str, ...] = Field(default=(), description="Globs that remove decisions again.")
    levels: dict[str, tuple[Level, ...]] = Field(default_factory=dict, description="Glob to allowed levels.")
    untie: bool = Field(default=False, description="Let fused linears (q/k/v, gate/up) decide apart.")


class Budget(_Strict):
    """When to stop: whichever comes first."""

    trials: int = Field(default=300, ge=1, description="Evaluations in full-token equivalents, table and guests included.")
    seconds: float | None = Field(default=None, gt=0, description="Wall time of the search.")


def _data(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _knobs(value: Any) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    return {name: {} for name in value} if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _none_listed(value: Any) -> Any:
    return () if value == "none" else _listed(value)


class Tasks(_Strict):
    """What finalists are asked with lm-eval."""

    names: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(default=(), description="Tasks of lm-eval, or of `path`.")
    path: str | None = Field(default=None, description="Folder of task files of one's own.")
    documents: int | None = Field(default=None, ge=1, description="Documents asked of each task; default all.")
    max_degradation: float | None = Field(
        default=None, ge=0, lt=1, description="Share of dense accuracy that may be lost on any task, or on labels."
    )

    @model_validator(mode="after")
    def _something_is_asked(self) -> Tasks:
        if not self.names and (self.path, self.documents) != (None, None):
            raise ValueError("names are missing: say which tasks are asked")
        return self

    def asked(self) -> TaskSpec | None:
        return TaskSpec(self.names, self.path, self.documents) if self.names else None


class JobSpec(_Strict):
    """Everything that a search depends on."""

    format: Literal[1] = Field(default=1, description="Of the job file.")
    model: str = Field(description="Directory, hub id, or a bundled model: demo.")
    data: Annotated[Data, BeforeValidator(_data)] = Field(default=Data(), description="Search text; bundled models bring their own.")
    eval_data: Annotated[Data | None, BeforeValidator(_data)] = Field(
        default=None, description="Held-out text; default is the last fifth of the search text."
    )
    tune_data: Annotated[Data | None, BeforeValidator(_data)] = Field(
        default=None, description="Text that adapters are trained on (knob lora_rank); all its windows unless a number is given."
    )
    knobs: Annotated[dict[str, dict[str, Any]], BeforeValidator(_knobs)] = Field(
        default={"bits": {}}, min_length=1, description="Knobs to search, with settings."
    )
    space: Space = Field(default=Space(), description="Which decisions there are.")
    objectives: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=("quality", "weight_bytes"), min_length=1, description="What to minimise; the first is the quality."
    )
    limits: tuple[str, ...] = Field(default=(), description="Hard limits, e.g. weight_bytes<=0.30x.")
    budget: Budget = Field(default=Budget(), description="When to stop.")
    tasks: Tasks = Field(default=Tasks(), description="What finalists are asked with lm-eval.")
    metrics: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(), description="Own functions of model and tokenizer, for finalists: package.module:function; on this machine only."
    )
    sampler: str = Field(default="additive", description="Who proposes.")
    seeds: Annotated[tuple[str, ...] | None, BeforeValidator(_none_listed)] = Field(
        default=None, description="Published rules that share out a knob's budget, as guests; default all that apply, `none` for none."
    )
    table_only: bool = Field(default=False, description="Measure the dense model and the damage table, and search nothing.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Draws the windows and everything random.")
    batch: int = Field(default=1, ge=1, description="Sequences decoded together, for cache and read costs.")
    context: int | None = Field(
        default=None, ge=1, description="Tokens in the cache, for cache and read costs; default the model's context."
    )
    device: str = Field(default="cpu", description="cpu, cuda or cuda:N.")
    queue: str | None = Field(
        default=None,
        pattern=r"^(cpu|gpu\.[a-z0-9.-]{1,50})$",
        description="On a server, the workers that evaluate it: cpu, gpu.any, gpu.KIND; default by the device.",
    )
    target: str | None = Field(
        default=None, description="A GPU that is not here, such as H200, whose latency counts, estimated from its data sheet."
    )

    @model_validator(mode="after")
    def _objectives_are_distinct(self) -> JobSpec:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives name {', '.join(self.objectives)}: each may stand once")
        return self

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> JobSpec:
        """The spec that a mapping describes.

        Raises:
            InputError: An unknown key or a value that is not allowed; one line naming the key.
        """
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            raise InputError(_line(error, value)) from None

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The mapping in a YAML or JSON file; the command line lays its flags over it.

        Raises:
            InputError: Unreadable, too large, not a mapping, or with aliases (which can explode).
        """
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(_FILE_CHARACTERS + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the job file {path}: {getattr(error, 'strerror', None) or error}") from None
        if len(text) > _FILE_CHARACTERS:
            raise InputError(f"the job file {path} is larger than the {_FILE_CHARACTERS} characters that are allowed")
        try:
            value = json.loads(text) if path.suffix == ".json" else _yaml(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            kind = "JSON" if path.suffix == ".json" else "YAML"
            raise InputError(f"the job file {path} is no valid {kind}: {' '.join(str(error).split())}") from None
        if not isinstance(value, dict):
            raise InputError(f"the job file {path} holds no mapping of job fields")
        return value

    def to_yaml(self) -> str:
        """The whole job as a file that `read` takes, defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def setup(self, bank: Path) -> EvaluationSetup:
        """What the runner must know."""
        space = SpaceSpec(self.knobs, self.space.include, self.space.exclude, self.space.levels, self.space.untie)
        eval_data = None if self.eval_data is None else self.eval_data.text()
        return EvaluationSetup(
            self.model,
            self.data.text(),
            eval_data,
            space,
            self.seed,
            self.device,
            str(bank),
            tasks=self.tasks.asked(),
            metrics=self.metrics,
            context=self.context,
            batch=self.batch,
            tune_data=None if self.tune_data is None else self.tune_data.text(),
        )


_PARTS: Mapping[str, type[_Strict]] = {"data": Data, "eval_data": Data, "tune_data": Data, "space": Space, "budget": Budget, "tasks": Tasks}


def _yaml(text: str) -> Any:
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):  # a few of them can stand for more than any memory holds
            raise ValueError("aliases are not allowed")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _FILE_DEPTH:  # the scanner takes quadratic time
            raise ValueError(f"it is nested deeper than {_FILE_DEPTH}")
    return yaml.safe_load(text)


def _line(error: ValidationError, value: Mapping[Any, Any]) -> str:
    first = error.errors()[0]
    where = ".".join(_path(first["loc"], value)) or "job"
    if first["type"] == "extra_forbidden":
        known = _PARTS.get(str(first["loc"][0]) if len(first["loc"]) > 1 else "", JobSpec)
        return f"unknown key {where!r}; known: {', '.join(known.model_fields)}"
    if first["type"] == "missing":
        return "the job names no model: give a directory, a hub id or demo"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    found = repr(first["input"])
    found = found if len(found) <= _SHOWN_CHARACTERS else found[:_SHOWN_CHARACTERS] + "…"
    return message if where == "job" else f"{where!r}: {message}; found {found}"


def _path(loc: Sequence[str | int], value: Any) -> Iterator[str]:
    """The keys of `loc` that stand in the input; pydantic puts names of validators and union members between them."""
    for part in loc:
        inside = part in value if isinstance(value, Mapping) else isinstance(value, list | tuple) and part in range(len(value))
        if inside:
            yield str(part)
            value = value[part]
