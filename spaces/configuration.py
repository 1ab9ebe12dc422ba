"""A configuration: a level for every decision. Its canonical JSON is its text, the SHA-256 of that is its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

__all__ = ["Configuration", "Level", "canonical_json", "digest_of"]

Level = int | float | str


def canonical_json(value: object) -> str:
    """Sorted keys, no spaces, no NaN: equal values have equal texts (RFC 8785 for the types used here)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: object) -> str:
    """SHA-256 of the canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Configuration:
    """An immutable level for every decision, by decision key (`site:knob`).

    Make one through `SearchSpace.configuration`, which validates and normalises inert decisions.
    """

    levels: Mapping[str, Level]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", MappingProxyType(dict(sorted(self.levels.items()))))

    @cached_property
    def canonical(self) -> str:
        return canonical_json(dict(self.levels))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configuration) and self.digest == other.digest

    def __reduce__(self) -> tuple[type[Configuration], tuple[dict[str, Level]]]:
        return Configuration, (dict(self.levels),)
