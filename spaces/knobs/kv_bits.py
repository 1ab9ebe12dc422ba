"""Bits of the keys and values that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.kv_cache import KvPlan, packed_bytes, plan_part
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["KvBits"]

_DENSE = 16
_WIDTHS = (8, 4, 2)


@dataclass(frozen=True)
class KvBits(Knob):
    """Codes of 8, 4 or 2 bits instead of 16-bit keys and values; keys and values of a layer decide apart.

    Keys share scale and minimum (fp16 each) by channel over a group of tokens, values by token over a head. The last tokens, and what
    does not fill a group, stay in 16 bits. Saves cache bytes, and the reading of them for every generated token.

    Attributes:
        group: Tokens that share the scales of keys, a power of two from 16; at most a 16th of the context, but no less than 16.
        recent: Last tokens that stay in 16 bits; at most a 32nd of the context.

    Source: KIVI, arXiv:2402.02750.
    """

    name: ClassVar[str] = "kv_bits"
    kind: ClassVar[Kind] = "cache"

    group: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if self.group < 16 or self.group & self.group - 1:
            raise InputError(f"kv_bits.group must be a power of two, at least 16: got {self.group}")
        if self.recent < 0:
            raise InputError(f"kv_bits.recent must be at least 0: got {self.recent}")

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind in ("keys", "values")]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """16 and every lower width that saves bytes; codes are packed by rows of a head, whose size must be a multiple of 8."""
        widths = _WIDTHS if self._size(site) % 8 == 0 else ()
        return (_DENSE, *(bits for bits in widths if self.cost(site, bits)["cache_bytes"] < 0))

    def constants(self, structure: Structure) -> Mapping[str, int]:
        kept = ((site.kv_bytes, site.kv) for site in structure.sites if site.kind == "keys")
        return {"cache_bytes": sum(kv_bytes * kv.context for kv_bytes, kv in kept if kv is not None)}

    def cost(self, site: Site, level: Level) -> Cost:
        """Of the tokens that an earlier level keeps: as few of them are packed as ever are, just before a round."""
        if level == _DENSE:
            return {}
        assert site.kv is not None
        sizes = KvPlan(group=self.group, recent=self.recent).sizes(site.kv.context)
        packed, size = sizes.packed(site.kv.kept - sizes.interval), self._size(site)
        stored = packed_bytes(site.kv_heads, size, packed, int(level), sizes.group, by_channel=site.kind == "keys")
        return {"cache_bytes": stored - BYTES_DENSE * site.kv_heads * size * packed}

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == _DENSE:
            return swap(model, {})
        part = {"key_bits" if site.kind == "keys" else "value_bits": int(level), "group": self.group, "recent": self.recent}
        return plan_part(model, site.attention, f"{self.name} {site.kind}", part)

    def kernel(self, site: Site, level: Level) -> str | None:
        return None if level == _DENSE else "attention_decode"

    def _size(self, site: Site) -> int:
        assert site.kv is not None
        return site.kv.key_size if site.kind == "keys" else site.kv.value_size
