"""`compose.yaml`: it is read and not run; what it would start exists, and what it would set is a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from autoeff.cli import app
from autoeff.search.settings import Settings


@pytest.fixture(scope="module")
def services(root: Path) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((root / "compose.yaml").read_text())["services"]
    return services


def test_every_part_of_a_service_is_there(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "redis", "migration", "api", "coordinator", "worker"}
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
    assert services["api"]["ports"] == ["127.0.0.1:8423:8423"], "a proxy with TLS stands before whoever is elsewhere"
    assert not any("ports" in services[name] for name in services if name != "api")


def test_every_command_is_one_of_the_command_line(services: dict[str, Any]) -> None:
    commands = [service["command"] for service in services.values() if service["image"] == "autoeff"]
    assert len(commands) == 4
    for program, *words in commands:
        assert program == "autoeff"
        verb: Any = typer.main.get_command(app)
        while words and hasattr(verb, "commands"):
            verb = verb.commands[words.pop(0)]
        verb.make_context("autoeff", list(words), resilient_parsing=False)  # refuses what it does not know


def test_every_variable_is_a_setting(services: dict[str, Any]) -> None:
    for service in services.values():
        given = service.get("environment", {})
        names = [name.removeprefix("AUTOEFF_").lower() for name in given if name.startswith("AUTOEFF_")]
        assert set(names) <= set(Settings.model_fields)
        secrets = [value for name, value in given.items() if name.endswith(("PASSWORD", "SECRET"))]
        assert all(value.startswith("${") for value in secrets), "no secret stands in the file"
