"""What an exporter is, and the export that is done only when a fresh process has measured it again."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from autoeff.errors import AutoeffError, InputError
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.search.runner_process import Measured, RunnerProcess
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Job, State, Trial
from autoeff.spaces.plugins import plugin, plugins

__all__ = ["Exported", "Exporter", "export_trial", "known_exporters"]

_TOLERANCE = {"decoded": (1e-6, 1e-4), "packed": (1e-4, 2e-2)}
"""Absolute and relative, by how the trial was computed: with decoded values a fresh process repeats sums of floats in the same order on the
same device; kernels that read packed codes round elsewhere (`demo` with bfloat16 activations: 5e-5 nats below 1e-3, 0.6 % above)."""


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        files: Names in `folder`.
        stored_bytes: Bytes of the searchable linears, counted from the packed tensors (not the size of the files).
        trial: The quality that the trial recorded.
        measured: The same quality, of the exported model in a fresh process.
    """

    format: str
    folder: Path
    files: tuple[str, ...]
    stored_bytes: int
    quality: str
    trial: float
    measured: float

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format, "folder": str(self.folder), "files": list(self.files), "linear_bytes": self.stored_bytes,
            "quality": self.quality, "trial": self.trial, "measured": self.measured,
        }  # fmt: skip


class Exporter(ABC):
    """Writes a configuration in one format.

    Attributes:
        name: As in `--format`.
    """

    name: ClassVar[str]

    @abstractmethod
    def write(self, job: Job, trial: Trial, runner: RunnerProcess, folder: Path) -> None:
        """Writes the files into the existing, empty `folder`."""

    @abstractmethod
    def remeasure(self, trial: Trial, runner: RunnerProcess, folder: Path) -> Measured:
        """Measures what `folder` holds, with a runner that has never seen the trial."""


_WHERE = ("autoeff.search.exporters", Exporter, "autoeff.exporters")


def known_exporters() -> Mapping[str, type[Exporter]]:
    """Every exporter on this machine by name."""
    return plugins(*_WHERE)


def export_trial(job: Job, trial: Trial, setup: EvaluationSetup, settings: Settings, folder: Path, format_name: str) -> Exported:
    """Writes a trial's configuration to `folder`, loads it in a fresh process, measures it and compares.

    Raises:
        InputError: Unknown format, a trial without a value, or an existing folder.
        AutoeffError: The exported model is not what the trial measured; nothing is left behind.
    """
    exporter: Exporter = plugin(*_WHERE, format_name)()
    quality = str(job.preflight["quality"])
    recorded = trial.value(quality)
    if trial.state is not State.SUCCEEDED or recorded is None:
        raise InputError(f"trial {trial.number} has no {quality} to export against (state {trial.state}, text {trial.split})")
    if folder.exists():
        raise InputError(f"{folder} exists already; name a folder that does not")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent}: {error.strerror}") from None
    try:
        with RunnerProcess(setup, settings, partial.with_suffix(".log")) as runner:
            exporter.write(job, trial, runner, partial)
            stored = runner.ask({"kind": "stored_bytes", "levels": dict(trial.configuration.levels)})["bytes"]
        with RunnerProcess(setup, settings, partial.with_suffix(".log")) as fresh:
            measured = next(m.value for m in exporter.remeasure(trial, fresh, partial).measurements if m.name == quality)
        absolute, relative = _TOLERANCE["packed" if setup.device.startswith("cuda") else "decoded"]
        if abs(measured - recorded) > absolute + relative * abs(recorded):
            raise AutoeffError(
                f"the exported model has {quality} {measured:.6g}, trial {trial.number} had {recorded:.6g}: nothing was exported"
            )
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.with_suffix(".log").unlink(missing_ok=True)
    return Exported(format_name, folder, tuple(sorted(p.name for p in folder.iterdir())), sum(stored.values()), quality, recorded, measured)
