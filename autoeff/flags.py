"""From the flags of `autoeff search` to the fields of a job, laid over those of a job file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from autoeff.errors import InputError

__all__ = ["FIELDS", "job_fields", "seconds_of"]

FIELDS: Mapping[str, str] = {
    "model": "model", "data": "data.source", "windows": "data.windows", "length": "data.length", "draw": "data.draw", "bos": "data.bos",
    "eval_data": "eval_data.source", "eval_windows": "eval_data.windows", "eval_length": "eval_data.length",
    "eval_draw": "eval_data.draw", "eval_bos": "eval_data.bos", "tune_data": "tune_data.source",
    "tune_windows": "tune_data.windows", "tune_length": "tune_data.length", "tune_draw": "tune_data.draw",
    "tune_bos": "tune_data.bos", "knobs": "knobs", "settings": "knobs",
    "include": "space.include",
    "exclude": "space.exclude", "levels": "space.levels", "untie": "space.untie", "objective": "objectives", "limit": "limits",
    "trials": "budget.trials", "timeout": "budget.seconds", "sampler": "sampler", "seed": "seed", "batch": "batch", "context": "context",
    "device": "device", "queue": "queue", "target": "target", "seeds": "seeds", "table_only": "table_only", "tasks": "tasks.names",
    "tasks_path": "tasks.path", "task_documents": "tasks.documents", "max_degradation": "tasks.max_degradation", "metric": "metrics",
}  # fmt: skip
"""The `JobSpec` field behind each flag of `search`."""
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def job_fields(flags: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the job that `base` (a job file) and the flags over it describe.

    Flags replace what the file says; settings and levels are added to those of the file, and win where both name the same.

    Raises:
        InputError: A flag that cannot be read.
    """
    job = deepcopy(dict(base))
    for name, path in FIELDS.items():
        value = flags.get(name)
        if value is None or (isinstance(value, list | tuple) and not value):
            continue
        section, _, key = path.partition(".")
        if section == "knobs":
            job["knobs"] = _chosen(value, job) if name == "knobs" else _with_settings(value, job)
        elif not key:
            job[section] = list(value) if name in ("limit", "metric") else _split(value) if name == "objective" else value
        else:
            part = _mapping(job, section)
            if key == "levels":
                part[key] = _with_levels(value, part.get(key) or {})
            else:
                part[key] = seconds_of(value) if key == "seconds" else _starts(value) if key == "draw" else value
    return job


def seconds_of(text: str) -> float:
    """The seconds that `90s`, `20m` or `2h` stand for.

    Raises:
        InputError: It is none of these.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
    if match is None:
        raise InputError(f"cannot read --timeout {text!r}; write for example 90s, 20m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def _starts(text: str) -> str | list[int]:
    return [int(part) for part in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text


def _mapping(job: dict[str, Any], section: str) -> dict[str, Any]:
    """A section of the job to write into; text given by its name alone becomes one."""
    value = job.get(section)
    if section in ("data", "eval_data", "tune_data") and isinstance(value, str):
        value = {"source": value}
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise InputError(f"{section!r} of the job file must be a mapping; found {value!r}")
    job[section] = value
    return value


def _knobs_of(job: Mapping[str, Any]) -> dict[str, Any]:
    from autoeff.search.job import JobSpec

    knobs = job.get("knobs", JobSpec.model_fields["knobs"].default)
    if isinstance(knobs, str):
        knobs = _split(knobs)
    if isinstance(knobs, list):
        knobs = {str(name): {} for name in knobs}
    if not isinstance(knobs, dict):
        raise InputError(f"'knobs' of the job file must be names or a mapping; found {knobs!r}")
    return {name: dict(settings or {}) for name, settings in knobs.items()}


def _chosen(text: str, job: Mapping[str, Any]) -> dict[str, Any]:
    known = _knobs_of(job) if "knobs" in job else {}
    return {name: known.get(name, {}) for name in _split(text)}


def _with_settings(items: Sequence[str], job: Mapping[str, Any]) -> dict[str, Any]:
    knobs = _knobs_of(job)
    for item in items:
        left, equals, value = item.partition("=")
        knob, dot, name = left.strip().partition(".")
        if not (equals and dot and knob and name):
            raise InputError(f"cannot read --set {item!r}; write for example bits.group_size=32")
        if knob not in knobs:
            raise InputError(f"--set {item!r}: {knob} is not among the knobs {', '.join(knobs)}; add it with --knobs")
        parts = [_scalar(part) for part in value.split(",")]
        knobs[knob][name] = parts if len(parts) > 1 else parts[0]
    return knobs


def _with_levels(items: Sequence[str], levels: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(levels)
    for item in items:
        glob, equals, value = item.rpartition("=")
        if not equals or not glob or not value:
            raise InputError(f"cannot read --levels {item!r}; write for example '*down_proj:bits=16,4,3'")
        found.pop(glob, None)  # the last glob that matches holds
        found[glob] = [_scalar(part) for part in value.split(",")]
    return found


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _scalar(text: str) -> int | float | bool | str:
    """A value as the job file would hold it."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
