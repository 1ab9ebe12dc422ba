"""Linears as products of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob
from autoeff.spaces.material import Material
from autoeff.spaces.sites import BYTES_DENSE, Linear, Site, Structure

__all__ = ["Rank", "output_directions"]

_DENSE = 1


@dataclass(frozen=True)
class Rank(Knob):
    """The share of a linear's weights that two factors U [N, R] and V [R, K] take, which stand for its W [N, K].

    Saves bytes and arithmetic alike, but only below the break-even rank N K / (N + K): three quarters of the bytes of a square matrix
    buy three eighths of its rank. The factors are those that lose least of the outputs on the calibration text: U holds the R directions in
    which the outputs vary most, and V = U^T W. Bits and masks of the same linear are those of the factors. Experts are left whole.

    Attributes:
        shares: Levels below 1: weights of both factors over those of the linear, rounded down to a rank.
        multiple: Ranks are multiples of it; a linear with no room for one stays as it is.

    Source: SVD-LLM, arXiv:2403.07378, of which these are the factors, found without a Cholesky factor or an inverse of X^T X.
    """

    name: ClassVar[str] = "rank"
    kind: ClassVar[Kind] = "structure"

    shares: tuple[float, ...] = (0.875, 0.75, 0.5, 0.25)
    multiple: int = 8

    def __post_init__(self) -> None:
        if (
            not self.shares
            or not all(0 < share < 1 for share in self.shares)
            or list(self.shares) != sorted(set(self.shares), reverse=True)
        ):
            raise InputError(f"rank.shares must fall between 1 and 0: got {', '.join(map(str, self.shares)) or 'none'}")
        if self.multiple < 1:
            raise InputError(f"rank.multiple must be at least 1: got {self.multiple}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "linears" and not any(linear.experts for linear in site.linears)]

    def levels(self, site: Site) -> tuple[Level, ...]:
        """1 and every share that keeps fewer weights than the one before."""
        levels: list[Level] = [_DENSE]
        for share in self.shares:
            if self.left(site, share).parameters < self.left(site, levels[-1]).parameters:
                levels.append(share)
        return tuple(levels)

    def cost(self, site: Site, level: Level) -> Cost:
        if level == _DENSE:
            return {}
        saved = self.left(site, level).parameters - site.parameters
        return {"linear_bytes": BYTES_DENSE * saved, "flops_per_token": int(2 * saved * site.linears[0].passes)}

    def left(self, site: Site, level: Level) -> Site:
        """V, which is fed what the linear was, and U behind it."""
        if level == _DENSE:
            return site
        return replace(site, linears=tuple(part for linear in site.linears for part in self._parts(linear, float(level))))

    def stored_level(self, site: Site, level: Level) -> Level:
        """Lower ranks are the first columns and rows of the highest."""
        return self.shares[0]

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, weight in material.weights.items():
            if rank := self._rank(len(weight), weight.shape[1], float(level)):
                values = weight.to(material.device, torch.float64)
                u = output_directions(values, material.needed(name)["hessian"].to(values))[:, :rank]
                stored[f"{name}.v"] = (u.T @ values).to("cpu", weight.dtype)
                stored[f"{name}.u"] = u.to("cpu", weight.dtype)
        return stored

    def derived(self, site: Site, level: Level, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        served: dict[str, Tensor] = {}
        for name, (v, u) in _pairs(entry).items():
            if rank := self._rank(len(u), v.shape[1], float(level)):
                served |= {f"{name}.v": v[:rank], f"{name}.u": u[:, :rank]}
        return served

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        return material.factored({name: pair for name, pair in _pairs(packed).items() if name in material.weights})

    def kernel(self, site: Site, level: Level) -> str | None:
        return None if level == _DENSE else "linear_lowrank"

    def _rank(self, n: int, k: int, share: float) -> int:
        """Of a linear [n, k]; 0 where it stays as it is."""
        return int(round(share * n * k / (n + k), 9)) // self.multiple * self.multiple

    def _parts(self, linear: Linear, share: float) -> tuple[Linear, ...]:
        rank = self._rank(linear.out_features, linear.in_features, share)
        return linear.factors(rank) if rank else (linear,)


def output_directions(weight: Tensor, hessian: Tensor) -> Tensor:
    """Orthonormal directions of the outputs, those of most variance first, [N, min(N, K)].

    They are the left singular vectors of W S, S S^T = X^T X, the squared singular values being the eigenvalues of W X^T X W^T. With the
    first R as U, the outputs of U U^T W differ from those of W by exactly the sum of the other squared singular values, and no matrix
    of rank R has less. X^T X need not be positive definite.

    Args:
        weight: W, float64 [N, K].
        hessian: X^T X in any scale, float64 [K, K].

    Raises:
        InputError: NaN or infinity in either.
    """
    if not bool(weight.isfinite().all() and hessian.isfinite().all()):
        raise InputError(f"a weight {list(weight.shape)} or the inputs that it is fed hold NaN or infinity; repair the checkpoint")
    n, k = weight.shape
    if n <= k:
        basis, core = None, weight
    else:
        basis, core = torch.linalg.qr(weight)  # so that the symmetric matrix is the smaller one
    directions: Tensor = torch.linalg.eigh(core @ hessian @ core.T).eigenvectors.flip(1)
    return directions if basis is None else basis @ directions


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """V and U by linear."""
    names = [key.removesuffix(".v") for key in tensors if key.endswith(".v")]
    return {name: (tensors[f"{name}.v"], tensors[f"{name}.u"]) for name in names}
