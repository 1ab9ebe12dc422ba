"""What a knob is: a kind of decision, everything about it in one file under `knobs/`.

A knob sees a site and a level, never a sampler. Its settings are its dataclass fields; `--set bits.group_size=32` fills them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_type_hints

from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.plugins import plugin, plugins
from autoeff.spaces.sites import Site, Structure

__all__ = ["Cost", "Kind", "Knob", "Undo", "known_knobs", "make_knob"]

Kind = Literal["structure", "weight", "cache", "runtime", "trained"]
Cost = Mapping[str, int]
"""Change against the dense level of primary quantities: `linear_bytes`, `kv_bytes_per_token`, `flops_per_token`."""
Undo = Callable[[], None]


@dataclass(frozen=True)
class Knob(ABC):
    """Base of every knob.

    Attributes:
        name: As written in `--knobs` and in decision keys.
        kind: Fixes the order at one site: structure, weight, cache, runtime, trained.
        conflicts: Names of knobs that may not be in the same space.
        needs: Names of the calibration statistics that `build` reads (see `evaluators/calibration.py`); empty for data-free knobs.
        uniform: Whether "the same level everywhere" is a configuration that people use, hence a baseline.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    conflicts: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    uniform: ClassVar[bool] = True

    @abstractmethod
    def sites(self, structure: Structure) -> Sequence[Site]:
        """The sites that this knob decides about."""

    @abstractmethod
    def levels(self, site: Site) -> tuple[Level, ...]:
        """Levels ordered by falling cost; the first is the dense model."""

    @abstractmethod
    def cost(self, site: Site, level: Level) -> Cost:
        """Exact change against dense; the dense level's is empty."""

    def silences(self, site: Site, level: Level) -> bool:
        """Whether this level makes every other decision about the site's linears inert."""
        return False

    def build(self, site: Site, level: Level, weights: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the bank stores for this level: packed tensors by name. Deterministic.

        Args:
            site: Where.
            level: Not the dense one.
            weights: 16-bit weights [N, K] by linear name, as the knobs that come earlier at this site have left them.
            statistics: What `needs` names, by `<linear>.<statistic>`.
        """
        return {}

    def decode(self, site: Site, level: Level, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `apply` needs, by parameter name (`<linear>.weight`); kept in memory by the bank."""
        return {}

    @abstractmethod
    def apply(self, model: nn.Module, site: Site, level: Level, decoded: Mapping[str, Tensor]) -> Undo:
        """Puts the level in force; the returned call restores the model bit-exactly."""

    def kernel(self, site: Site, level: Level) -> str | None:
        """The file of `kernels/` that serves this level; None means that its latency is dense."""
        return None

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


_WHERE = ("autoeff.spaces.knobs", Knob, "autoeff.knobs")


def known_knobs() -> dict[str, type[Knob]]:
    """Every knob on this machine by name."""
    return plugins(*_WHERE)


def make_knob(name: str, settings: Mapping[str, Any]) -> Knob:
    """The knob `name` with `settings` over its defaults; text values (from `--set`) are converted.

    Raises:
        InputError: Unknown knob or setting, or a value it does not allow.
    """
    knob = plugin(*_WHERE, name)
    types = get_type_hints(knob)
    allowed = [f.name for f in fields(knob)]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in allowed:
            raise InputError(f"unknown setting {name}.{key}; known: {', '.join(allowed) or 'none'}")
        values[key] = _converted(f"{name}.{key}", value, types[key])
    return knob(**values)


def _converted(key: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if kind in (int, float, str):
            return kind(value)
        return tuple(int(part) for part in value.split(","))
    except (KeyError, ValueError):
        raise InputError(f"{key}: {value!r} is not a {getattr(kind, '__name__', 'list of numbers')}") from None
