"""Tokens whose keys and values are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.knob import Cost, Kind, Knob, Undo, swap
from autoeff.spaces.kv_cache import POLICIES, KvPlan, Sizes, plan_part
from autoeff.spaces.sites import Site, Structure

__all__ = ["KvBudget"]

_DENSE = 1


@dataclass(frozen=True)
class KvBudget(Knob):
    """The share of the context whose keys and values a layer keeps; a policy says which tokens these are.

    Saves cache bytes, and the reading of them for every generated token, not weights. The first tokens (sinks) and the last ones
    (window) always stay. A prompt is read in blocks, each against what is kept of those before it, so the cache holds its budget and
    one block of one layer at most. Lengths are tokens of a large context: for smaller ones they shrink to a 64th (sinks), a 32nd (window)
    and an eighth (block) of it. Quality is measured on the second half of each window of text, generated after the first half.

    Attributes:
        policy: `streaming`, `h2o`, `snapkv` or `tova`.
        shares: Shares of the context, below 1.
        sinks: First tokens that stay.
        window: Last tokens that stay.
        block: Tokens of a prompt between two evictions.
        pool: Neighbours whose maximum is a token's score, odd; snapkv only.

    Source: StreamingLLM, arXiv:2309.17453; H2O, arXiv:2306.14048; SnapKV, arXiv:2404.14469; TOVA, arXiv:2401.06104.
    """

    name: ClassVar[str] = "kv_budget"
    kind: ClassVar[Kind] = "cache"

    policy: str = "snapkv"
    shares: tuple[float, ...] = (0.75, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625)
    sinks: int = 4
    window: int = 32
    block: int = 512
    pool: int = 7

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"kv_budget.policy must be one of {', '.join(POLICIES)}: got {self.policy!r}")
        if not all(0 < share < 1 for share in self.shares) or list(self.shares) != sorted(set(self.shares), reverse=True):
            raise InputError(f"kv_budget.shares must fall between 1 and 0: got {', '.join(map(str, self.shares))}")
        for name, least in (("sinks", 0), ("window", 1), ("block", 1), ("pool", 1)):
            if getattr(self, name) < least:
                raise InputError(f"kv_budget.{name} must be at least {least}: got {getattr(self, name)}")
        if self.pool % 2 == 0:
            raise InputError(f"kv_budget.pool must be odd: got {self.pool}")

    def sizes(self, context: int) -> Sizes:
        """The lengths at a context, of a layer that keeps everything."""
        return self._plan(_DENSE).sizes(context)

    def sites(self, structure: Structure) -> Sequence[Site]:
        return [site for site in structure.sites if site.kind == "attention" and site.kv is not None and site.kv.context]

    def levels(self, site: Site) -> tuple[Level, ...]:
        assert site.kv is not None
        self._check(site.kv.context, "a context")
        return (_DENSE, *self.shares)

    def check_length(self, tokens: int) -> None:
        self._check(tokens, "a window")

    def _check(self, tokens: int, what: str) -> None:
        """Refuses shares of `tokens` that leave no room for sinks, window and what is generated between two evictions."""
        for share in self.shares:
            sizes = self._plan(share).sizes(tokens)
            if sizes.budget is not None and sizes.budget < sizes.least:
                raise InputError(
                    f"kv_budget.shares: {share} of {what} of {tokens} tokens keeps {sizes.budget}, fewer than the {sizes.least} that "
                    f"{sizes.sinks} sinks, a window of {sizes.window} and {sizes.interval} new ones take; "
                    f"give shares from {sizes.least / tokens:.4g}, or {what.replace('a ', 'a longer ')}"
                )

    def constants(self, structure: Structure) -> Mapping[str, int]:
        kept = [(site.kv_bytes, site.kv.context) for site in self.sites(structure) if site.kv is not None]
        blocks = [kv_bytes * self.sizes(context).block for kv_bytes, context in kept]
        return {"cache_bytes": sum(kv_bytes * context for kv_bytes, context in kept), "block_bytes": max(blocks, default=0)}

    def cost(self, site: Site, level: Level) -> Cost:
        if level == _DENSE:
            return {}
        assert site.kv is not None
        return {"cache_bytes": -site.kv_bytes * (site.kv.kept - self._kept(site, level))}

    def left(self, site: Site, level: Level) -> Site:
        assert site.kv is not None
        return site if level == _DENSE else replace(site, kv=replace(site.kv, kept=self._kept(site, level)))

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        if level == _DENSE:
            return swap(model, {})
        plan = self._plan(level)
        part = {name: getattr(plan, name) for name in ("share", "policy", "sinks", "window", "block", "pool")}
        return plan_part(model, site.attention, self.name, part)

    def kernel(self, site: Site, level: Level) -> str | None:
        return None if level == _DENSE else "attention_decode"

    def _kept(self, site: Site, level: Level) -> int:
        assert site.kv is not None
        budget = self._plan(level).sizes(site.kv.context).budget
        return site.kv.kept if budget is None else budget

    def _plan(self, level: Level) -> KvPlan:
        return KvPlan(float(level), self.policy, self.sinks, self.window, self.block, self.pool)
