"""Numbers that keys and values are kept as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.kv_cache import Basis, plan_part
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Site, Structure

__all__ = ["KvRank"]

_DENSE = 1


@dataclass(frozen=True)
class KvRank(Knob):
    """The share of a head's size that is kept of each key or value: its coordinates along the main axes of those of the calibration text.

    Axes are those of a principal component analysis, head by head, of keys as they are attended to (after their rotation) and of values;
    nothing is trained. Keys and values of a layer decide apart. Saves cache bytes, and the reading of them for every generated token; the
    axes take some, which are counted for every sequence. With `kv_bits` the coordinates are what is packed.

    Attributes:
        shares: Levels below 1.
        multiple: Coordinates are kept in multiples of it, rounded up.

    Source: the untrained form of MatryoshkaKV, arXiv:2410.14731.
    """

    name: ClassVar[str] = "kv_rank"
    kind: ClassVar[Kind] = "cache"
    conflicts: ClassVar[frozenset[str]] = frozenset({"attention_sparsity", "passes"})

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    multiple: int = 8

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.shares) or list(self.shares) != sorted(set(self.shares), reverse=True):
            raise InputError(f"kv_rank.shares must fall between 1 and 0: got {', '.join(map(str, self.shares))}")
        if self.multiple < 1:
            raise InputError(f"kv_rank.multiple must be at least 1: got {self.multiple}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mean", "covariance"})

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind in ("keys", "values") and len(self.levels(site)) > 1]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """1 and every share that saves more than the one before."""
        levels: list[Level] = [_DENSE]
        for share in self.shares:
            if self._bytes(site, share) < self._bytes(site, levels[-1]):
                levels.append(share)
        return tuple(levels)

    def constants(self, structure: Structure) -> Mapping[str, int]:
        kept = ((site.kv_bytes, site.kv) for site in structure.sites if site.kind == "keys")
        return {"cache_bytes": sum(kv_bytes * kv.context for kv_bytes, kv in kept if kv is not None)}

    def cost(self, site: Site, level: Level) -> Cost:
        return {} if level == _DENSE else {"cache_bytes": self._bytes(site, level) - self._bytes(site, _DENSE)}

    def left(self, site: Site, level: Level) -> Site:
        if level == _DENSE:
            return site
        assert site.kv is not None
        kv = replace(site.kv, **{"key_size" if site.kind == "keys" else "value_size": self._rank(site, level)})
        return replace(site, kv=kv, kv_bytes=BYTES_DENSE * site.kv_heads * (kv.key_size + kv.value_size))

    def stored_level(self, site: Site, level: Level) -> Level:
        """Fewer axes are the first of more."""
        return self.shares[0]

    def derived(self, site: Site, level: Level, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**entry, "axes": entry["axes"][..., : self._rank(site, level)]}

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        """`mean` [heads, size] and `axes` [heads, size, rank], float32; the axis of greatest variance is first."""
        known = material.needed(site.name)
        axes = torch.linalg.eigh(known["covariance"].double()).eigenvectors.flip(-1)
        return {"mean": known["mean"].float(), "axes": axes[..., : self._rank(site, level)].float()}

    def apply_built(self, model: nn.Module, site: Site, level: Level, built: Mapping[str, Tensor]) -> Undo:
        if level == _DENSE:
            return swap(model, {})
        like = next(model.parameters())
        basis = Basis(*(built[name].to(like.device) for name in ("mean", "axes")))
        return plan_part(model, site.attention, f"{self.name} {site.kind}", {"key_basis" if site.kind == "keys" else "value_basis": basis})

    def _rank(self, site: Site, level: Level) -> int:
        assert site.kv is not None
        size = site.kv.key_size if site.kind == "keys" else site.kv.value_size
        return min(size, ceil(round(float(level) * size, 9) / self.multiple) * self.multiple)

    def _bytes(self, site: Site, level: Level) -> int:
        """Of one sequence's keys or values, with the axes and the mean."""
        assert site.kv is not None
        rank, size = self._rank(site, level), self._rank(site, _DENSE)
        return BYTES_DENSE * site.kv_heads * (site.kv.kept * rank + (size * (rank + 1) if rank < size else 0))
