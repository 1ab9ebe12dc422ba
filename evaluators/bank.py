"""The level bank: every (site, knob, level) built once, stored packed, found by what it was made from.

An entry is one safetensors file named by the SHA-256 of its key: model digest, site, knob, settings, level and, for knobs that
read them, the statistics. Files are written under a temporary name, synced and renamed, so that any number of processes may
build the same bank; what is damaged is built again. Entries are memory-mapped; decoded ones are kept in memory up to a limit.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level, canonical_json, digest_of
from autoeff.spaces.knob import Knob
from autoeff.spaces.sites import Site

__all__ = ["Bank", "Statistics"]

FORMAT = 1


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics by `<linear>.<name>`, and the digest of the text behind them."""

    text_digest: str
    tensors: Mapping[str, Tensor]


class Bank:
    """Entries of one model.

    Attributes:
        statistics: What calibration found; set before a knob that needs some is built.
        built: Entries built, not found, by this object.

    Args:
        folder: Shared by every model; created on first use.
        model_digest: Names the model's content.
        dtype: The 16-bit dtype of the store: of dense weights, and of values when they are decoded.
        weights: Gives the dense 16-bit weight [N, K] of a linear.
        place: Moves a decoded tensor to the compute dtype and device.
        keep_bytes: Memory for decoded tensors.
    """

    def __init__(
        self,
        folder: Path,
        model_digest: str,
        dtype: torch.dtype,
        weights: Callable[[str], Tensor],
        place: Callable[[Tensor], Tensor],
        keep_bytes: int,
    ) -> None:
        self.folder = folder / f"v{FORMAT}"
        self.model_digest = model_digest
        self.statistics = Statistics("", {})
        self._dtype, self._weights, self._place, self._keep_bytes = dtype, weights, place, keep_bytes
        self._decoded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._decoded_bytes = 0
        self.built = 0

    def packed(self, knob: Knob, site: Site, level: Level) -> dict[str, Tensor]:
        """The stored tensors of a level, memory-mapped; built and stored first if needed.

        Raises:
            InputError: The folder cannot be written.
        """
        key = self._key(knob, site, level)
        path = self.folder / key[:2] / f"{key}.safetensors"
        if (entry := _read(path)) is not None:
            return entry
        weights = {linear.name: self._weights(linear.name) for linear in site.linears}
        needed = {name: tensor for name, tensor in self.statistics.tensors.items() if name.rpartition(".")[2] in knob.needs}
        tensors = knob.build(site, level, weights, needed)
        data = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"entry": canonical_json(self._facts(knob, site, level))},
        )
        try:
            _write(path, data)
        except OSError as error:
            raise InputError(
                f"cannot write the level bank at {self.folder}: {error.strerror}; set AUTOEFF_HOME to a folder that can be written"
            ) from None
        self.built += 1
        return tensors

    def decoded(self, knob: Knob, site: Site, level: Level) -> dict[str, Tensor]:
        """What `knob.apply` needs, in the compute dtype on the device."""
        key = self._key(knob, site, level)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        decoded = knob.decode(site, level, self.packed(knob, site, level), self._dtype)
        entry = {name: self._place(tensor) for name, tensor in decoded.items()}
        self._decoded[key] = entry
        self._decoded_bytes += _bytes(entry)
        while self._decoded_bytes > self._keep_bytes and len(self._decoded) > 1:
            self._decoded_bytes -= _bytes(self._decoded.popitem(last=False)[1])
        return entry

    def _facts(self, knob: Knob, site: Site, level: Level) -> dict[str, object]:
        return {
            "format": FORMAT,
            "model": self.model_digest,
            "linears": [linear.name for linear in site.linears],
            "knob": knob.name,
            "settings": knob.settings(),
            "level": level,
            "statistics": self.statistics.text_digest if knob.needs else None,
        }

    def _key(self, knob: Knob, site: Site, level: Level) -> str:
        return digest_of(self._facts(knob, site, level))


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry, or None where it is absent or damaged (a half-written disk, a cut file)."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle, not a mapping)
    except (FileNotFoundError, SafetensorError):
        return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".building-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
