"""Families that differ in structure, and a structure made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autoeff.spaces.sites import Linear, Site, Structure


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3", "gpt2", "bert"])
def family(request: pytest.FixtureRequest) -> str:
    """A `model_type` of every kind of structure in turn, for `tiny_model`."""
    return str(request.param)


@pytest.fixture
def make_structure() -> Callable[..., Structure]:
    """`make_structure(blocks, k=64)`: blocks of attention (q+k+v, o) and FFN (up, down) with linears [k, k]."""

    def make(blocks: int, k: int = 64) -> Structure:
        sites: list[Site] = []
        for i in range(blocks):
            for kind, groups in (("attn", (("q", "k", "v"), ("o",))), ("mlp", (("up",), ("down",)))):
                path = f"blocks.{i}.{kind}"
                linears = {name: Linear(f"{path}.{name}", k, k, bias=False) for group in groups for name in group}
                sublayer = tuple(linears.values())
                whole = "attention" if kind == "attn" else "ffn"
                sites.append(Site(path, whole, i, sublayer, sublayer[-1].name, kv_bytes=4 * k if whole == "attention" else 0))
                for group in groups:
                    sites.append(Site(f"{path}.{'+'.join(group)}", "linears", i, tuple(linears[name] for name in group)))
        searchable = blocks * 6 * k * k
        return Structure("made_by_hand", tuple(f"blocks.{i}" for i in range(blocks)), tuple(sites), searchable + 1000, 400, 300)

    return make
