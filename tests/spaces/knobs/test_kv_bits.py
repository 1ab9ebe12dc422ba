"""Which widths there are, what they cost, and what is refused. Values are compared with the kernels' in `test_kv_cache.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import make_knob
from autoeff.spaces.sites import find_structure
from autoeff.spaces.space import SpaceSpec


def test_keys_and_values_decide_apart_and_cost_codes_scales_and_what_is_not_packed(tiny_model: Callable[..., nn.Module]) -> None:
    structure = find_structure(tiny_model("qwen3")).at_context(1024)  # 2 KV heads of 16
    space, _ = build_space(structure, SpaceSpec({"kv_bits": {}}))
    assert [d.key.removeprefix("model.layers.0.self_attn.") for d in space.decisions[:2]] == ["keys:kv_bits", "values:kv_bits"]
    costs = CostModel(space, batch=1, context=1024)
    packed = (1024 - 16 - 32) // 32 * 32  # tokens, but for an interval and the recent ones
    for decision, tables in zip(space.decisions[:2], (packed // 32 * 16, packed), strict=True):
        for bits in (8, 4, 2):
            saved = costs.dense("kv_bytes") - costs.exact("kv_bytes", space.indices({decision.key: bits}))
            assert saved == 2 * (2 * 16 * packed - (16 * packed * bits // 8 + 4 * tables))
    assert "kv_peak_bytes" not in costs.measures  # nothing is thinned


def test_head_sizes_that_kernels_do_not_pack_have_no_lower_width(tiny_model: Callable[..., nn.Module]) -> None:
    structure = find_structure(tiny_model("llama", head_dim=12)).at_context(512)
    with pytest.raises(InputError, match="the space is empty"):
        build_space(structure, SpaceSpec({"kv_bits": {}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"group": 24}, "kv_bits.group must be a power of two, at least 16: got 24"), ({"recent": -1}, "kv_bits.recent must be at least 0")],
)
def test_wrong_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_knob("kv_bits", settings)
