"""The adapters of a configuration as PEFT reads them: `adapter_config.json` with ranks by linear, and the factors."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from autoeff.errors import InputError
from autoeff.search.exporter import Exporter
from autoeff.search.runner_process import Measured, RunnerProcess
from autoeff.search.storage.records import Job, Trial

__all__ = ["Peft"]


class Peft(Exporter):
    """`PeftModel.from_pretrained(model, folder)` gives what the trial measured; for searches of `lora_rank` alone."""

    name: ClassVar[str] = "peft"

    def write(self, job: Job, trial: Trial, runner: RunnerProcess, folder: Path) -> None:
        if others := sorted(job.spec["knobs"].keys() - {"lora_rank"}):
            raise InputError(f"an adapter alone does not hold what was decided about {', '.join(others)}; export with --format hf-dense")
        runner.ask({"kind": "export_adapter", "levels": dict(trial.configuration.levels), "folder": str(folder)})

    def remeasure(self, trial: Trial, runner: RunnerProcess, folder: Path) -> Measured:
        return runner.remeasure_adapter(folder, trial.split, trial.windows)
