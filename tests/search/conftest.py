"""Finished searches on a tiny model, made once and copied for every test that writes to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings
from autoeff.search.storage.store import Store

LOOSE, TIGHT = "linear_bytes<=0.35x", "linear_bytes<=0.30x"


@dataclass(frozen=True)
class Searched:
    """A machine with two finished searches of the same model on the same text, within 0.35 and 0.30 of its linear bytes."""

    settings: Settings
    loose: Path
    tight: Path

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        with self.opened() as store:
            trials = store.trials(json.loads((folder / "run.json").read_text())["job"])
            return [trial.to_json() for trial in trials]

    def opened(self) -> Store:
        return Store.open(self.settings.database)


@pytest.fixture(scope="session")
def tiny_job(tiny_models: dict[str, Path], tiny_text: Path) -> Callable[..., JobSpec]:
    """`tiny_job(family="llama", **fields)`: a job on a tiny model with a few fields of its own."""

    def make(family: str = "llama", **fields: object) -> JobSpec:
        job: dict[str, object] = {
            "model": str(tiny_models[family]),
            "data": {"source": str(tiny_text), "windows": 8, "length": 16},
            "eval_data": {"source": str(tiny_text), "windows": 8, "length": 16, "draw": "first"},
            "knobs": {"bits": {"group_size": 16}, "skip": {}},
            "budget": {"trials": 60},
        }
        return JobSpec.parse(job | fields)

    return make


@pytest.fixture(scope="session")
def searched_once(tiny_job: Callable[..., JobSpec], once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def search(root: Path) -> None:
        settings = Settings(home=root / "home", memory_cap_bytes=3 << 30)
        for name, limit in (("loose", LOOSE), ("tight", TIGHT)):
            start(tiny_job(limits=[limit]), root / name, settings)

    return once("searched", search)


@pytest.fixture
def searched(searched_once: Path, tmp_path: Path) -> Searched:
    """A copy that a test may write to."""
    root = Path(shutil.copytree(searched_once, tmp_path / "machine"))
    settings = Settings(home=root / "home", memory_cap_bytes=3 << 30)
    for name in ("loose", "tight"):
        file = root / name / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"database": settings.database}))
    return Searched(settings, root / "loose", root / "tight")
