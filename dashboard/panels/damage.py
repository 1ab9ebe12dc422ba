"""The damage map: what each level of each decision lost alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.fetch import Snapshot, Terrain
from autoeff.dashboard.figures.maps import draw_damage
from autoeff.dashboard.layers import damage_grids, damage_of_rows
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import show
from autoeff.dashboard.words import markdown

__all__ = ["damage_of", "draw"]

_MOST = 20_000


def draw(found: Visitor, now: Snapshot, ground: Terrain | None) -> None:
    """The map, also while the table is being measured."""
    if ground is None:
        st.write("A search of own code has no layers, and so no damage map.")
        return
    grids = damage_grids(ground, damage_of(found, now, ground))
    if not grids:
        st.write(
            "Nothing of the damage table is measured yet. Each level is tried alone early in a search; the map fills while that goes on."
        )
        return
    st.caption(f"{markdown(now.job.quality)} lost by each level alone, everything else dense; colours are on one logarithmic scale.")
    for number, grid in enumerate(grids):
        drawn = draw_damage(grid, visit.colours(), revision=now.job.job)
        show(drawn, f"damage_{number}", f"Damage of the levels of {grid.knob} by block and place")


def damage_of(found: Visitor, now: Snapshot, ground: Terrain) -> Mapping[str, Mapping[str, float | None]]:
    """The table by decision and level: of the result, or of the trials that measure it so far."""
    if now.result is not None:
        table: Mapping[str, Mapping[str, float | None]] = (now.result.get("table") or {}).get("damage", {})
        return table
    kept = st.session_state.get("damage")
    key = (now.job.job, now.job.events)
    if kept is None or kept[0] != key:
        rows = list(islice(found.client.trials(now.job.job, origin="table"), _MOST))
        st.session_state["damage"] = kept = (key, damage_of_rows(ground, rows, now.job.quality))
    measured: Mapping[str, Mapping[str, float | None]] = kept[1]
    return measured
