"""The form of a job, from the schema that the server gives: fields, and the body, the file and the command line that they stand for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from autoeff.errors import InputError
from autoeff.flags import FIELDS

__all__ = ["Field", "body_of", "command_of", "fields_of", "parsed", "values_of", "written", "yaml_of"]

Kind = Literal["text", "integer", "number", "flag", "choice", "list", "yaml"]
_SPELT = {"settings": "--set"}
"""Flags whose name is not that of their parameter."""


@dataclass(frozen=True)
class Field:
    """A field of a job.

    Attributes:
        path: Such as `budget.trials`.
        kind: How it is typed in.
        default: Without which it is not sent.
        nullable: Whether it may be left empty.
        choices: Of a choice.
    """

    path: str
    kind: Kind
    default: Any
    help: str
    nullable: bool = False
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The part of the job that it belongs to; empty at the top."""
        return self.path.rpartition(".")[0]

    @property
    def label(self) -> str:
        """The last part of its path, for people."""
        return self.path.rpartition(".")[2].replace("_", " ")


def fields_of(contract: Mapping[str, Any], name: str = "JobSpec") -> list[Field]:
    """Every field of a job in the order of the schema, those of its parts in their place.

    Args:
        contract: An OpenAPI document.
        name: Of the schema.
    """
    schemas = contract["components"]["schemas"]
    return list(_fields(schemas, schemas[name], "", {}))


def body_of(fields: Sequence[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request: what is not as the server would set it itself."""
    body: dict[str, Any] = {}
    for field in fields:
        value = values.get(field.path, field.default)
        if value == field.default or (value in ("", None) and not field.nullable):
            continue
        part = body
        *above, last = field.path.split(".")
        for key in above:
            part = part.setdefault(key, {})
        part[last] = value
    return body


def values_of(fields: Sequence[Field], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields in a job, such as one to be cloned."""
    values = {}
    for field in fields:
        value: Any = spec
        for key in field.path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        values[field.path] = field.default if value is None else value
    return values


def yaml_of(body: Mapping[str, Any]) -> str:
    """The job as a file that `--config` takes."""
    return yaml.safe_dump(dict(body), sort_keys=False, allow_unicode=True) if body else ""


def command_of(body: Mapping[str, Any]) -> str:
    """The command line that does the same."""
    words = ["autoeff", "search"]
    for flag, path in FIELDS.items():
        value: Any = body
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None or value == ():
            continue
        if flag == "model":
            words.append(str(value))
            continue
        spelt = _SPELT.get(flag, "--" + flag.replace("_", "-"))
        words += _flag(flag, spelt, value)
    return " ".join(shlex.quote(word) for word in words)


def parsed(field: Field, text: str) -> Any:
    """What was typed into a field that takes YAML.

    Raises:
        InputError: It is none.
    """
    if not text.strip():
        return field.default
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{field.path}: {' '.join(str(error).split())[:200]}") from None


def written(value: Any) -> str:
    """A value as such a field shows it."""
    return (
        ""
        if value in (None, {}, [], ())
        else yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None).removesuffix("...\n").strip()
    )


def _fields(schemas: Mapping[str, Any], schema: Mapping[str, Any], above: str, defaults: Any) -> Any:
    for name, found in schema["properties"].items():
        path = f"{above}.{name}" if above else name
        if "const" in found:
            continue
        options = [option for option in found.get("anyOf", [found]) if option.get("type") != "null"]
        nullable = len(options) < len(found.get("anyOf", [found]))
        default = defaults.get(name, found.get("default")) if isinstance(defaults, Mapping) else found.get("default")
        one = options[0] if len(options) == 1 else None
        if one is not None and "$ref" in one:
            yield from _fields(schemas, schemas[one["$ref"].rpartition("/")[2]], path, default or {})
        else:
            yield _field(path, one, default, str(found.get("description", "")), nullable)


def _field(path: str, one: Mapping[str, Any] | None, default: Any, text: str, nullable: bool) -> Field:
    if one is None:
        return Field(path, "yaml", default, text, nullable)
    least = one.get("minimum", one.get("exclusiveMinimum"))
    most = one.get("maximum", one.get("exclusiveMaximum"))
    if "enum" in one:
        return Field(path, "choice", default, text, nullable, choices=tuple(map(str, one["enum"])))
    if one["type"] == "array" and one.get("items", {}).get("type") == "string":
        return Field(path, "list", default, text, nullable)
    kinds: Mapping[str, Kind] = {"string": "text", "integer": "integer", "number": "number", "boolean": "flag"}
    return Field(path, kinds.get(one["type"], "yaml"), default, text, nullable, least, most)


def _flag(flag: str, spelt: str, value: Any) -> list[str]:
    if flag == "knobs":
        return [spelt, ",".join(value)]
    if flag == "settings":
        pairs = [(knob, name, setting) for knob, settings in value.items() for name, setting in (settings or {}).items()]
        return [word for knob, name, setting in pairs for word in (spelt, f"{knob}.{name}={_listed(setting)}")]
    if flag == "levels":
        return [word for glob, levels in value.items() for word in (spelt, f"{glob}={_listed(levels)}")]
    if flag == "timeout":
        return [spelt, f"{value:g}s"]
    if value is True:
        return [spelt]
    if flag in ("include", "exclude", "limit", "metric"):
        return [word for item in value for word in (spelt, str(item))]
    if flag == "seeds" and not value:
        return [spelt, "none"]
    return [spelt, _listed(value)]


def _listed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_listed(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
