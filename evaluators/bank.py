"""The level bank: every (site, knob, level) built once, stored packed, found by what it was made from.

An entry is one safetensors file named by the SHA-256 of its key: model digest, the site's linears, knob, settings and level, the
same of every level in force before it at these linears, and, if one of them reads statistics, the digest of their text. Files
are written under a temporary name, synced and renamed, so that any number of processes may build the same bank; what is damaged
is built again. Entries are built one by one from the weights of one site, and memory-mapped; decoded ones are kept in memory up to
a limit.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level, canonical_json, digest_of
from autoeff.spaces.knob import Knob
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Linear, Site

__all__ = ["Bank", "Chain", "Statistics", "Step", "entry_bytes", "write_whole"]

FORMAT = 1
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics by `<linear>.<name>`, and the digest of the text behind them."""

    text_digest: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """A level other than the dense one, at a site."""

    knob: Knob
    site: Site
    level: Level

    @cached_property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.site.linears) or (self.site.name,)


Chain = tuple[Step, ...]
"""The steps that act on a linear, in the order in which they are taken."""


class Bank:
    """Entries of one model.

    Attributes:
        statistics: What calibration found; set before a knob that needs some is built.
        built: Entries built, not found, by this object.

    Args:
        folder: Shared by every model; created on first use.
        model_digest: Names the model's content.
        linears: Every searchable linear by name.
        weights: Gives the dense weight [N, K] of a linear on the CPU, in the 16-bit dtype of the store.
        place: Moves a decoded tensor to the device, in the dtype in which the model keeps the parameter.
        keep_bytes: Memory for decoded tensors, and for what kernels read.
        device: Where levels are built that take long on a CPU; what they store, and all else, is on the CPU.
    """

    def __init__(
        self,
        folder: Path,
        model_digest: str,
        linears: Mapping[str, Linear],
        weights: Callable[[str], Tensor],
        place: Callable[[Tensor], Tensor],
        keep_bytes: int,
        device: torch.device = _CPU,
    ) -> None:
        self.folder = folder / f"v{FORMAT}"
        self.model_digest = model_digest
        self.statistics = Statistics("", {})
        self._linears, self._weights, self._place, self._keep_bytes, self._device = linears, weights, place, keep_bytes, device
        self._decoded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._decoded_bytes = 0
        self.built = 0

    def packed(self, chain: Chain) -> dict[str, Tensor]:
        """What the chain's last step serves: the tensors of its entry, or what the knob derives from them.

        Raises:
            InputError: The folder cannot be written.
        """
        *before, step = chain
        return step.knob.derived(step.site, step.level, self._entry((*before, _stored(step))))

    def files(self, steps: Iterable[Step]) -> dict[Path, Step]:
        """The steps by the file that each has alone, whether it is there or not; of several levels that one serves, one is named."""
        return {self._path((_stored(step),)): step for step in steps}

    def _entry(self, chain: Chain) -> dict[str, Tensor]:
        """The stored tensors of the chain's last step, memory-mapped; built and stored first if needed."""
        path = self._path(chain)
        if (entry := _read(path)) is not None:
            return entry
        *before, step = chain
        needs = step.knob.needs
        if needs:  # what is known of factors follows from what made them
            needs = needs.union(*(earlier.knob.needs for earlier in before))
        tensors = step.knob.build(step.site, step.level, self.material(tuple(before), step.linears, needs))
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"entry": canonical_json(self._facts(chain))})
        try:
            write_whole(path, data)
        except OSError as error:
            raise InputError(
                f"cannot write the level bank at {self.folder}: {error.strerror}; set AUTOEFF_HOME to a folder that can be written"
            ) from None
        self.built += 1
        return tensors

    def decoded(self, chain: Chain, linears: Sequence[str]) -> dict[str, Tensor]:
        """The parameters of some linears, by name and in their own shape, in the compute dtype on the device."""

        def made() -> dict[str, Tensor]:
            material = self.material(chain, linears)
            return {self._linears[name].weight: self._place(material.parameter(self._linears[name])) for name in linears}

        return self._kept([self._facts(chain), list(linears)], made)

    def served(self, chain: Chain, linear: str, device: torch.device) -> dict[str, Tensor]:
        """What a kernel reads of one linear, or of one of its factors, by bare names on a device."""

        def made() -> dict[str, Tensor]:
            prefix = f"{linear}."
            found = {name.removeprefix(prefix): tensor for name, tensor in self.packed(chain).items() if name.rpartition(".")[0] == linear}
            return {name: tensor.to(device) for name, tensor in found.items()}

        return self._kept([self._facts(chain), linear, "served", str(device)], made)

    def _kept(self, key: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        name = digest_of(key)
        if name in self._decoded:
            self._decoded.move_to_end(name)
            return self._decoded[name]
        entry = self._decoded[name] = make()
        self._decoded_bytes += _bytes(entry)
        while self._decoded_bytes > self._keep_bytes and len(self._decoded) > 1:
            self._decoded_bytes -= _bytes(self._decoded.popitem(last=False)[1])
        return entry

    def stored_bytes(self, chain: Chain, linear: str) -> int:
        """Bytes of a linear, counted from the tensors that the chain serves."""
        prefix, total, values = f"{linear}.", 0, None
        for i in range(len(chain)):
            parts = {n.removeprefix(prefix): t.nbytes for n, t in self.packed(chain[: i + 1]).items() if n.startswith(prefix)}
            beside = sum(size for part, size in parts.items() if part.rpartition(".")[2] in chain[i].knob.beside)
            total += beside
            values = sum(parts.values()) - beside if parts else values
        return total + (self.material(chain, [linear]).weights[linear].nbytes if values is None else values)

    def material(self, chain: Chain, linears: Sequence[str], needs: Collection[str] = ()) -> Material:
        """The linears after the steps of a chain, with the statistics that are asked for."""
        tensors = self.statistics.tensors
        statistics = {name: tensors[name] for linear in linears for need in needs if (name := f"{linear}.{need}") in tensors}
        weights = {name: self._weights(name) for name in linears if name in self._linears}
        material = Material(weights, statistics=statistics, device=self._device)
        for i, step in enumerate(chain):
            material = step.knob.transform(step.site, step.level, self.packed(chain[: i + 1]), material)
        return material

    def _facts(self, chain: Chain) -> dict[str, object]:
        calibrated = any(step.knob.needs for step in chain)
        return {
            "format": FORMAT,
            "model": self.model_digest,
            "steps": [
                {"linears": list(step.linears), "knob": step.knob.name, "settings": step.knob.settings(), "level": step.level}
                for step in chain
            ],
            "statistics": self.statistics.text_digest if calibrated else None,
        }

    def _path(self, chain: Chain) -> Path:
        key = digest_of(self._facts(chain))
        return Path(f"{self.folder}/{key[:2]}/{key}.safetensors")


def entry_bytes(step: Step) -> int:
    """Bytes of the tensors that the bank stores for a step where everything else is dense."""
    if step.knob.coupled and step.site.coupling is not None:
        return 8 * step.site.coupling.units  # the places that are kept, at most all of them
    if step.knob.applies_built:
        if step.site.kv is not None and not step.site.linears:
            return 4 * step.site.kv_heads * max(step.site.kv.key_size, step.site.kv.value_size) ** 2  # axes
        routers = step.knob.cost(step.site, step.level).get("router_bytes", 0)
        return routers + 8 * sum(max(linear.in_features, linear.experts) for linear in step.site.linears)  # a choice, or a number an input
    stored = _stored(step)
    return BYTES_DENSE * stored.site.parameters + stored.knob.cost(stored.site, stored.level).get("linear_bytes", 0)


def _stored(step: Step) -> Step:
    return replace(step, level=step.knob.stored_level(step.site, step.level))


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry, or None where it is absent or damaged (a half-written disk, a cut file)."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle, not a mapping)
    except (FileNotFoundError, SafetensorError):
        return None


def write_whole(path: Path, data: bytes) -> None:
    """Puts a file in place that is whole at any moment, whoever else writes it; its folder is made."""
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
