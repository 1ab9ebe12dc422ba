"""What this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from autoeff.errors import AutoeffError
from autoeff.search.exporter import known_exporters
from autoeff.search.runs import sqlite_file
from autoeff.search.sampler import known_samplers
from autoeff.search.settings import Settings
from autoeff.search.storage.store import Store
from autoeff.spaces.knob import known_knobs
from autoeff.spaces.measurements import MEASURES
from autoeff.spaces.quantizer import known_quantizers

__all__ = ["SUPPORTED", "Check", "Diagnosis", "Plugin", "examine"]

SUPPORTED: Mapping[str, str] = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.3,<6",
    "triton": ">=3.6",
    "optuna": ">=5.0,<6",
    "sqlalchemy": ">=2.0.36,<2.2",
}
"""Versions that this release is tested with; the same as in the package's metadata."""
_PYTHON = ((3, 11), (3, 14))
_ROOM_BYTES = 2 << 30
"""Below this much free disk or memory a search of even a small model is likely to fail."""
_SIGNS: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        state: `warning` where a search runs all the same.
        found: What is there.
        remedy: A command or a sentence; empty where all is well.
    """

    name: str
    state: Literal["ok", "warning", "broken"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Plugin:
    """A knob, quantizer, sampler or exporter, and the module it is from."""

    kind: str
    name: str
    where: str


@dataclass(frozen=True)
class Diagnosis:
    """The state of this machine."""

    checks: tuple[Check, ...]
    plugins: tuple[Plugin, ...]

    @property
    def healthy(self) -> bool:
        """Whether a search can run."""
        return all(check.state != "broken" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "checks": [asdict(c) for c in self.checks], "plugins": [asdict(p) for p in self.plugins]}


def examine(settings: Settings) -> Diagnosis:
    """Looks at the machine without changing it; a database that exists is brought to this version's revision."""
    plugins: list[Plugin] = []
    checks = [
        _python(),
        *(_package(name, wanted) for name, wanted in SUPPORTED.items() if name != "triton" or sys.platform == "linux"),
        _memory(settings.memory_cap),
        Check("cores", "ok", f"{len(psutil.Process().cpu_affinity()) if sys.platform == 'linux' else os.cpu_count()} of {os.cpu_count()}"),
        *_devices(),
        *_home(settings.home),
        _database(settings.database),
    ]
    for kind, known in (("knob", known_knobs), ("quantizer", known_quantizers), ("sampler", known_samplers), ("exporter", known_exporters)):
        try:
            plugins += [Plugin(kind, name, item.__module__) for name, item in sorted(known().items())]
        except (AutoeffError, ImportError, AttributeError) as error:  # of a third party; it would break every search
            checks.append(Check(f"{kind}s", "broken", " ".join(str(error).split()), "uninstall or mend the package that brings it"))
    return Diagnosis(tuple(checks), tuple(plugins))


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if _PYTHON[0] <= sys.version_info[:2] < _PYTHON[1]:
        return Check("python", "ok", found)
    return Check("python", "broken", found, "use Python 3.11, 3.12 or 3.13")


def _package(name: str, wanted: str) -> Check:
    mend = f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "broken", "not installed", mend)
    if supports(version, wanted):
        return Check(name, "ok", version)
    return Check(name, "warning", f"{version}, tested with {wanted}", mend)


def supports(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as `>=2.11,<2.14`."""
    clauses = (re.fullmatch(r"(>=|<)([0-9.]+)", clause) for clause in wanted.split(","))
    return all(match is not None and _SIGNS[match[1]](_numbers(version), _numbers(match[2])) for match in clauses)


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def _room(name: str, free: int, total: int, remedy: str) -> Check:
    text = MEASURES["weight_bytes"].text
    found = f"{text(free)} free of {text(total)}"
    return Check(name, "ok", found) if free >= _ROOM_BYTES else Check(name, "warning", found, remedy)


def _memory(cap: int) -> Check:
    room = _room("memory", psutil.virtual_memory().available, psutil.virtual_memory().total, "close other programs")
    return replace(room, found=f"{room.found}; a runner may hold {MEASURES['weight_bytes'].text(cap)} (AUTOEFF_MEMORY_CAP_BYTES)")


def _devices() -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield Check("cuda", "ok", "none; searches run on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield Check(
            f"cuda:{i}", "ok", f"{device.name}, {MEASURES['weight_bytes'].text(device.total_memory)}, sm_{device.major}{device.minor}"
        )


def _home(home: Path) -> Iterator[Check]:
    there = _nearest([home, *home.absolute().parents])
    if not (there.is_dir() and os.access(there, os.W_OK)):
        yield Check("home", "broken", f"{home} cannot be written", "export AUTOEFF_HOME=/a/folder/that/can/be/written")
        return
    yield Check("home", "ok", f"{home}{'' if home.exists() else ', made by the first search'}")
    usage = shutil.disk_usage(there)
    yield _room("disk", usage.free, usage.total, "free some space, or set AUTOEFF_HOME to a larger disk")


def _nearest(paths: Iterable[Path]) -> Path:
    return next((path for path in paths if path.exists()), Path("/"))


def _database(url: str) -> Check:
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return Check("database", "ok", f"{file}, made by the first search")
    try:
        with Store.open(url) as store:
            newest = store.jobs(limit=1)
    except AutoeffError as error:
        return Check("database", "broken", str(error), "mend it as it says, or set AUTOEFF_DATABASE_URL to another file")
    return Check("database", "ok", f"{file or url}, {'newest job ' + newest[0].id if newest else 'no jobs'}")
