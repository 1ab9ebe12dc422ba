"""The form: from the schema to the body, and from the body to the command line and back."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer
import yaml

from autoeff.api.app import openapi_document
from autoeff.cli import app
from autoeff.dashboard.form import body_of, command_of, fields_of, parsed, values_of, written, yaml_of
from autoeff.errors import InputError
from autoeff.flags import job_fields
from autoeff.search.job import JobSpec


@pytest.fixture(scope="module")
def fields() -> list[Any]:
    return fields_of(openapi_document())


def leaves(model: Any, above: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        part = next((t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(t, "model_fields")), None)
        found |= leaves(part, f"{above}{name}.") if part is not None else {f"{above}{name}"}
    return found


def test_every_field_of_a_job_stands_in_the_form(fields: list[Any]) -> None:
    assert {field.path for field in fields} == leaves(JobSpec) - {"format"}
    kinds = {field.path: field.kind for field in fields}
    assert (kinds["model"], kinds["budget.trials"], kinds["space.untie"], kinds["data.bos"]) == ("text", "integer", "flag", "choice")
    assert (kinds["limits"], kinds["space.levels"], kinds["data.draw"]) == ("list", "yaml", "yaml")
    assert all(field.help for field in fields if field.path not in ("space", "tasks"))


def test_a_body_holds_what_is_not_the_default(fields: list[Any]) -> None:
    assert body_of(fields, {"model": "demo", "seed": 0, "budget.trials": 300}) == {"model": "demo"}
    assert body_of(fields, {"model": "demo", "budget.trials": 40, "limits": ["avg_bits<=3"], "context": None}) == {
        "model": "demo",
        "budget": {"trials": 40},
        "limits": ["avg_bits<=3"],
    }


BODIES: list[dict[str, Any]] = [
    {"model": "demo"},
    {"model": "a b/c", "limits": ["avg_bits<=3.5", "kv_bytes<=0.5x"], "knobs": {"bits": {"group_size": 32, "levels": [16, 4]}, "skip": {}}},
    {"model": "m", "data": {"source": "x y.txt", "windows": 4, "draw": [1, 5]}, "space": {"levels": {"*:bits": [16, 4, 3]}, "untie": True}},
    {
        "model": "m",
        "budget": {"trials": 9, "seconds": 90.0},
        "seeds": [],
        "table_only": True,
        "tasks": {"names": ["a", "b"]},
        "metrics": ["p:f"],
    },
]


@pytest.mark.parametrize("body", BODIES)
def test_the_command_line_is_the_same_job(body: dict[str, Any]) -> None:
    command, search, *words = shlex.split(command_of(body))
    assert (command, search) == ("autoeff", "search")
    context = typer.main.get_command(app).commands["search"].make_context("search", words)  # type: ignore[attr-defined]
    assert JobSpec.parse(job_fields(context.params, {})) == JobSpec.parse(body)


@pytest.mark.parametrize("body", BODIES)
def test_the_file_is_the_same_job(body: dict[str, Any]) -> None:
    assert yaml.safe_load(yaml_of(body)) == body


@pytest.mark.parametrize("body", BODIES)
def test_a_clone_is_the_same_job(fields: list[Any], body: dict[str, Any]) -> None:
    spec = JobSpec.parse(body).model_dump(mode="json")
    assert JobSpec.parse(body_of(fields, values_of(fields, spec))) == JobSpec.parse(body)


def test_yaml_in_a_field_is_read_and_written(fields: list[Any]) -> None:
    levels = next(field for field in fields if field.path == "space.levels")
    value = {"*:bits": [16, 4]}
    assert parsed(levels, written(value)) == value
    assert parsed(levels, " ") == levels.default
    with pytest.raises(InputError, match="space.levels"):
        parsed(levels, "{a: [")
