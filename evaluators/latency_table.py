"""What was measured on one device, as a file that other processes and searches go on with."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from autoeff.errors import InputError
from autoeff.kernels.tuned import digest
from autoeff.spaces.configuration import digest_of

__all__ = ["FORMAT", "PHASES", "Entry", "Fit", "LatencyTable", "Operation", "Phase", "locked"]

FORMAT = 1
Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True)
class Operation:
    """Something that is timed on its own.

    Attributes:
        name: `linear`, or a file of `kernels/`; `attention_decode` and `attention_prefill`.
        sizes: By name, sorted.
        dtype: Of the activations.
    """

    name: str
    sizes: tuple[tuple[str, int], ...]
    dtype: str

    @property
    def key(self) -> str:
        return " ".join([self.name, *(f"{name}={size}" for name, size in self.sizes), self.dtype])

    def __getitem__(self, size: str) -> int:
        return dict(self.sizes)[size]


@dataclass(frozen=True)
class Entry:
    """The time of an operation in nanoseconds: median and quartiles over rounds."""

    median_ns: int
    low_ns: int
    high_ns: int
    rounds: int


@dataclass(frozen=True)
class Fit:
    """What the operations of one model leave out, in one phase.

    Attributes:
        constants: In nanoseconds by kind of sublayer, and `model`; factors by kind of operation.
        whole: Kinds of sublayers that `skip` leaves out with all that is in them.
        unserved: Knobs whose shapes do not run in this model, which is then timed in the dense ones.
        rows: Calibration: label, measured and fitted nanoseconds.
    """

    constants: Mapping[str, float]
    whole: tuple[str, ...] = ()
    unserved: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class LatencyTable:
    """What was measured on one device; a JSON file that other processes and searches go on with.

    Attributes:
        device: Name of CPU or GPU.
        versions: Of everything that times depend on.
        threads: Of torch; 0 on a GPU.
        date: Of the first measurement.
        entries: By the key of an operation.
        fits: By digest of model shapes, phase, batch and context.
    """

    device: str
    versions: Mapping[str, str]
    threads: int
    date: str
    entries: Mapping[str, Entry] = field(default_factory=dict)
    fits: Mapping[str, Fit] = field(default_factory=dict)

    @classmethod
    def empty(cls, device: torch.device) -> LatencyTable:
        """For what is measured here and now."""
        gpu = device.type == "cuda"
        versions = {name: _version(name) for name in ("autoeff", "torch", "transformers", "triton")} | {"python": platform.python_version()}
        name = torch.cuda.get_device_name(device) if gpu else _cpu_name()
        if gpu:  # `autoeff kernels tune` changes what kernels take; nothing does on a CPU
            versions["kernels"] = digest(name)
        return cls(name, versions, 0 if gpu else torch.get_num_threads(), date.today().isoformat())

    @property
    def hardware(self) -> str:
        return f"{self.device} x{self.threads}" if self.threads else self.device

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatencyTable:
        """The table that `to_json` wrote.

        Raises:
            InputError: Another format number, or not what `to_json` writes.
        """
        if value.get("format") != FORMAT:
            raise InputError(f"latency table of format {value.get('format')!r}; this version reads {FORMAT}")
        try:
            fits = {
                key: Fit(fit["constants"], tuple(fit["whole"]), tuple(fit["unserved"]), tuple(fit["rows"]))
                for key, fit in value["fits"].items()
            }
            entries = {key: Entry(**entry) for key, entry in value["entries"].items()}
            return cls(value["device"], value["versions"], value["threads"], value["date"], entries, fits)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"not a latency table as this version writes it: {error!r}") from None

    @classmethod
    def read(cls, path: Path, device: torch.device) -> LatencyTable:
        """The table in a file, of this very device; an empty one where there is no file.

        Raises:
            InputError: It was measured elsewhere, with other versions or threads; or it is damaged.
        """
        here = cls.empty(device)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return here
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"cannot read the latency table {path}: {error}; remove it to measure again") from None
        table = cls.from_json(value if isinstance(value, dict) else {})
        for what in ("device", "threads", "versions"):
            if (found := getattr(table, what)) != (expected := getattr(here, what)):
                raise InputError(
                    f"the latency table {path} was measured with {what} {found}, here it is {expected}; remove it to measure again"
                )
        return table

    def write(self, path: Path) -> None:
        """Replaces the file as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".measuring-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)
        Path(temporary).replace(path)

    def path(self, folder: Path) -> Path:
        """Where a table of this device, these versions and threads belongs."""
        name = re.sub(r"[^a-z0-9]+", "-", self.hardware.lower()).strip("-")
        return folder / f"{name}-{digest_of([FORMAT, self.versions])[:8]}.json"


def _version(package: str) -> str:
    """What is installed; a bare tree has no metadata of its own."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return f"CPU {found[1].strip() if found else platform.machine()}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process measures for a table at a time: two would disturb each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
