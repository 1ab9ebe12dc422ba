"""Tokens of an encoder that go on to the next block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.sites import Site, Structure
from autoeff.spaces.thinned_tokens import thin_before

__all__ = ["TokenKeep"]

_DENSE = 1


@dataclass(frozen=True)
class TokenKeep(Knob):
    """The share of a text's or an image's tokens that enter a block of an encoder, those that the class token attends to most.

    The others are fused into one, weighted by that attention. Shares are of all tokens: a block whose share is not lower than an earlier
    one's drops nothing more. Saves operations of the block's linears. They are counted for its own share, so configurations whose shares
    do not rise with depth cost what is counted, others less; the class token and the fused one, which are always there, are not counted.
    Embeddings are means of the tokens that are left. No checkpoint holds it: it stands in the recipe.

    Attributes:
        shares: Levels below 1.

    Source: EViT, arXiv:2202.07800.
    """

    name: ClassVar[str] = "token_keep"
    kind: ClassVar[Kind] = "structure"
    conflicts: ClassVar[frozenset[str]] = frozenset({"passes"})
    of_blocks: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.9, 0.7, 0.5)

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.shares) or list(self.shares) != sorted(set(self.shares), reverse=True):
            raise InputError(f"token_keep.shares must fall between 1 and 0: got {', '.join(map(str, self.shares))}")

    @property
    def beside_weights(self) -> bool:
        return True

    def sites(self, structure: Structure) -> Sequence[Site]:
        """Every block of an encoder but the first."""
        return [site for site in structure.sites if site.kind == "block" and site.block and not structure.head_parameters]

    def first_block(self, site: Site) -> int:
        """Tokens are dropped where the block before ends."""
        return site.block - 1

    def levels(self, site: Site) -> tuple[Level, ...]:
        return (_DENSE, *self.shares)

    def cost(self, site: Site, level: Level) -> Cost:
        fewer = site.parameters_per_token - self.left(site, level).parameters_per_token
        return {"flops_per_token": -2 * fewer} if fewer else {}

    def left(self, site: Site, level: Level) -> Site:
        return replace(site, linears=tuple(replace(linear, passes=float(level)) for linear in site.linears)) if level != _DENSE else site

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        return swap(model, {}) if level == _DENSE else thin_before(model, site.name, float(level))
