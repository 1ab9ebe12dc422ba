"""One set of colours for every chart, on light and on dark pages.

Those of knobs are Okabe and Ito's (jfly.uni-koeln.de/color), which people with any of the common forms of colour blindness tell apart; on
dark pages they are lighter. No chart tells roles apart by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType

__all__ = ["DARK", "LIGHT", "MARKS", "ROLES", "Palette", "mixed", "palette"]


@dataclass(frozen=True)
class Palette:
    """Colours of one kind of page.

    Attributes:
        page: Behind everything.
        ink: Text.
        muted: Text that matters less.
        line: Grids and borders.
        found: What the search found, and its front.
        guest: Baselines and limits.
        harm: From harmless to the worst, at equal steps of a logarithm.
        searched: Trials that the sampler proposed.
        trial: Other trials.
        runs: Jobs over each other, told apart by dashes too.
    """

    name: str
    page: str
    ink: str
    muted: str
    line: str
    found: str
    guest: str
    harm: tuple[str, ...]
    searched: str
    trial: str
    runs: tuple[str, ...]
    _knobs: Mapping[str, str]
    _others: tuple[str, ...]

    def knob(self, name: str) -> str:
        """The colour of a knob, everywhere; one that autoeff does not bring has always the same, too."""
        return self._knobs.get(name) or self._others[sha256(name.encode()).digest()[0] % len(self._others)]


LIGHT = Palette(
    name="light",
    page="#ffffff",
    ink="#1c2330",
    muted="#5d6573",
    line="#d9dee7",
    found="#1d63d8",
    guest="#b4531a",
    harm=("#fdf6f1", "#f6d7c3", "#d98a58", "#b4531a", "#5a2408"),
    searched="#6f9ceb",
    trial="#9aa3b2",
    runs=("#1d63d8", "#b4531a", "#2e8b57", "#8e44ad", "#b8860b", "#6b7382"),
    _knobs=MappingProxyType(
        {
            "bits": "#0072b2", "sparsity": "#d55e00", "skip": "#5b6472", "kv_budget": "#b3558c", "kv_bits": "#009e73", "experts": "#c98a00",
            "heads": "#3a9bd1", "width": "#7a5ab5", "rank": "#7d7400", "lora_rank": "#a63d57", "experts_kept": "#a0522d",
            "activation_sparsity": "#e0732a", "attention_sparsity": "#2f7d6b", "passes": "#8a8f99", "token_keep": "#c2468f",
            "ffn_experts": "#6b8e23",
        }
    ),
    _others=("#4c6a92", "#8a6d3b", "#3f7f7f", "#8c4a6b"),
)  # fmt: skip
DARK = Palette(
    name="dark",
    page="#12151b",
    ink="#e6e9ef",
    muted="#98a1b2",
    line="#303846",
    found="#7aabff",
    guest="#f0925a",
    harm=("#1d1a1a", "#4a2a1a", "#8f4a22", "#f0925a", "#ffd9c2"),
    searched="#6f9ceb",
    trial="#9aa3b2",
    runs=("#7aabff", "#f0925a", "#6fd39a", "#c39bd3", "#e0b94f", "#98a1b2"),
    _knobs=MappingProxyType(
        {
            "bits": "#4fa8e0", "sparsity": "#f08a4b", "skip": "#98a1b2", "kv_budget": "#dd8fbb", "kv_bits": "#3cc7a0", "experts": "#f0b93a",
            "heads": "#8fd0f5", "width": "#a98be0", "rank": "#c9c04a", "lora_rank": "#e07a92", "experts_kept": "#d89a78",
            "activation_sparsity": "#f7a878", "attention_sparsity": "#7fcab8", "passes": "#c0c6d0", "token_keep": "#f0a0d0",
            "ffn_experts": "#b5d56a",
        }
    ),
    _others=("#8aa6cf", "#c9a86b", "#7bbcbc", "#c98aa9"),
)  # fmt: skip
MARKS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "cross",
        "uniform": "square",
        "additive": "diamond",
        "seed": "triangle-down",
        "random": "triangle-up",
        "found": "star",
        "measured": "circle-open",
        "expected": "star-diamond",
    }
)
"""How roles are marked, so that colour is not all that tells them apart."""
ROLES: Mapping[str, str] = MappingProxyType(
    {
        "dense": "dense", "uniform": "uniform levels", "additive": "additive optimum", "seed": "published rules",
        "random": "best of random", "found": "found", "measured": "best measured", "expected": "expected to be best",
    }
)  # fmt: skip
"""Roles for people."""


def palette(kind: str | None) -> Palette:
    """The colours for a page of this kind, `light` or `dark`; what is not known yet is light."""
    return DARK if kind == "dark" else LIGHT


def mixed(below: str, above: str, share: float) -> str:
    """One colour over another at this share, both as `#rrggbb`."""
    parts = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (below, above))
    return "#" + "".join(f"{round(a * share + b * (1 - share)):02x}" for b, a in zip(*parts, strict=True))
