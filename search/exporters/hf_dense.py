"""A checkpoint in the original shapes that transformers alone loads: values dequantised, skipped sublayers as zeros.

Its files are as large as the dense model's; the bytes of the configuration are those of the packed tensors. What is decided about the
cache is no weight: it stands in the recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from autoeff.search.exporter import Exporter
from autoeff.search.exporters.recipe import FILE, recipe_of
from autoeff.search.runner_process import Measured, RunnerProcess
from autoeff.search.storage.records import Job, Trial

__all__ = ["HFDense"]


class HFDense(Exporter):
    """safetensors, config and tokenizer, with the recipe beside them."""

    name: ClassVar[str] = "hf-dense"

    def write(self, job: Job, trial: Trial, runner: RunnerProcess, folder: Path) -> None:
        runner.ask({"kind": "export", "levels": dict(trial.configuration.levels), "folder": str(folder)})
        (folder / FILE).write_text(recipe_of(job, trial))

    def remeasure(self, trial: Trial, runner: RunnerProcess, folder: Path) -> Measured:
        return runner.remeasure(folder, trial.split, trial.windows, trial.configuration.levels)
