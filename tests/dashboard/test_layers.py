"""A configuration by layers."""

from __future__ import annotations

from typing import Any

import pytest

from autoeff.dashboard.layers import changes, damage_grids, damage_of_rows, grids_of, saved_by_block, shares_of


def test_every_decision_is_a_cell(ground: Any, client: Any, shown: Any) -> None:
    configuration = shown.best.configuration
    grids = grids_of(ground, configuration)
    assert {grid.knob for grid in grids} == {"skip", "bits", "kv_bits"}
    assert sum(len(grid.cells) for grid in grids) == len(ground.space.decisions)
    bits = next(grid for grid in grids if grid.knob == "bits")
    cell = bits.cells[0, ("self_attn.o_proj",)]
    assert cell.text == str(configuration["model.layers.0.self_attn.o_proj:bits"])
    assert cell.title.startswith("model.layers.0.self_attn.o_proj:bits = ")


def test_what_is_skipped_shows_no_level(ground: Any) -> None:
    grids = {grid.knob: grid for grid in grids_of(ground, {"model.layers.2.mlp:skip": "skip"})}
    cell = grids["bits"].cells[2, ("mlp.down_proj",)]
    assert (cell.text, cell.share) == ("\u2013", None)


def test_what_decisions_save_is_what_the_configuration_saves(ground: Any, shown: Any) -> None:
    configuration = shown.best.configuration
    shares = shares_of(ground, configuration, {})
    costs = ground.costs
    for name in ("weight_bytes", "bytes_per_token"):
        saved = float(costs.dense(name)) - float(costs.exact(name, ground.space.indices(configuration)))
        assert sum(share.saved[name] for share in shares) == pytest.approx(saved)
        blocks = saved_by_block(shares, name)
        assert sum(value for found in blocks.values() for value in found.values()) == pytest.approx(saved)


def test_changes_name_both_levels(ground: Any) -> None:
    key = "model.layers.1.mlp.down_proj:bits"
    ((decision, one, other),) = changes(ground, {key: 4}, {key: 2})
    assert (decision.key, one, other) == (key, 4, 2)


def test_the_damage_map_is_the_same_from_trials_and_from_the_result(ground: Any, client: Any, shown: Any) -> None:
    rows = list(client.trials(shown.job.job, origin="table"))
    measured = damage_of_rows(ground, rows, "kl")
    stored = shown.result["table"]["damage"]
    assert len(measured) > 10
    for decision, levels in measured.items():
        for level, value in levels.items():
            assert stored[decision][level] == pytest.approx(value), (decision, level)


def test_damage_shares_one_scale(ground: Any) -> None:
    keys = ["model.layers.0.mlp.down_proj:bits", "model.layers.0.mlp:skip"]
    grids = damage_grids(ground, {keys[0]: {"4": 1e-4, "2": None}, keys[1]: {"skip": 1.0}})
    bits, skip = (next(grid for grid in grids if grid.knob == knob) for knob in ("bits", "skip"))
    assert bits.cells[0, ("mlp.down_proj", "4")].share == 0.0
    assert skip.cells[0, ("mlp", "skip")].share == 1.0
    assert bits.cells[0, ("mlp.down_proj", "2")].text == "fails"
    assert damage_grids(ground, {}) == []
