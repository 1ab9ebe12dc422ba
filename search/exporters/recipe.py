"""The configuration as a file: what was decided where, for which model, and what it measured. Holds no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.exporter import Exporter
from autoeff.search.runner_process import Measured, RunnerProcess
from autoeff.search.storage.records import Job, Trial

__all__ = ["FILE", "FORMAT", "Recipe", "recipe_of"]

FORMAT = 1
FILE = "recipe.json"


class Recipe(Exporter):
    """`recipe.json`: a level for every decision, with the settings of the knobs and the digest of the model."""

    name: ClassVar[str] = "recipe"

    def write(self, job: Job, trial: Trial, runner: RunnerProcess, folder: Path) -> None:
        (folder / FILE).write_text(recipe_of(job, trial))

    def remeasure(self, trial: Trial, runner: RunnerProcess, folder: Path) -> Measured:
        levels = json.loads((folder / FILE).read_text())["configuration"]
        return runner.evaluate(EvaluationRequest(levels, trial.split, trial.windows))


def recipe_of(job: Job, trial: Trial) -> str:
    """The text of `recipe.json`."""
    recipe = {
        "format": FORMAT,
        "model": {key: job.preflight["model"][key] for key in ("model_type", "digest", "parameters")},
        "knobs": job.spec["knobs"],
        "untie": job.spec["space"]["untie"],
        "context": job.spec["context"] or job.preflight["model"]["context"],
        "digest": trial.configuration.digest,
        "configuration": dict(trial.configuration.levels),
        "measurements": {m.name: m.to_json() for m in trial.measurements},
    }
    return json.dumps(recipe, indent=1) + "\n"
