"""What was found, beside the baselines that every search is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from autoeff.dashboard.fetch import Snapshot
from autoeff.dashboard.outline import is_open
from autoeff.dashboard.theme import ROLES
from autoeff.dashboard.words import NOTHING, figure, plain

__all__ = ["draw", "table_of"]

_CONFIRMED = ("perplexity_held_out", "spearman_held_out", "passkey_accuracy")


def draw(now: Snapshot) -> None:
    """The end table; while there is none, the baselines that are measured."""
    if now.result is None:
        rows = [
            {"configuration": plain(now.uniform.get(point.trial, point.origin)), "trial": point.trial}
            | {now.points.x: figure(now.points.x, point.x), now.points.y: figure(now.points.y, point.y)}
            for point in now.whole
            if point.origin in ("dense", "uniform")
        ]
        if not rows:
            coming = "The baselines are measured first: the dense model, and every level everywhere. They appear here."
            st.write(coming if is_open(now.job) else "No baseline was measured.")
            return
        st.dataframe(rows, hide_index=True, height="content")
        st.caption("The end table stands here when the search has ended.")
        return
    st.dataframe(table_of(now), hide_index=True, height="content")
    st.caption(
        "Lower is better, except for Spearman. Quality is measured against the dense model; finalists are confirmed on held-out text. "
        "Times found: the loss as a multiple of that of what was found."
    )


def table_of(now: Snapshot) -> list[dict[str, Any]]:
    """The end table for people: what was found first, then the baselines."""
    result: Any = now.result
    quality, columns, rows = str(result["quality"]), now.job.columns, result["rows"]
    confirmed = [name for name in _CONFIRMED if any(row.get(name) is not None for row in rows)]
    asked = [name for name in dict.fromkeys(name for row in rows for name in row) if str(name).startswith("accuracy:")]
    several = len({row["point"] for row in rows if row["point"]}) > 1
    found = next((row["search"] for row in rows if row["role"] == "found"), None)
    shown = []
    for row in sorted(rows, key=lambda row: row["role"] != "found"):
        cells = {"configuration": _title(row, own=now.own, several=several), "trial": str(row["trial"])}
        cells["limits"] = "kept" if row["feasible"] else "not kept"
        cells |= {plain(title, 60): figure(name, row["costs"].get(name)) for name, title in columns.items()}
        cells[quality] = figure(quality, row["search"])
        if found and not now.own:
            times = (row["search"] or 0.0) / found
            cells["times found"] = NOTHING if not times or row["role"] == "found" else f"{times:.2f}x" if times >= 0.01 else "< 0.01x"
        if not now.own:
            cells[f"{quality} held out"] = figure(quality, row["held_out"])
        cells |= {name.replace("_held_out", " held out"): figure(name, row[name]) for name in confirmed}
        cells |= {plain(name, 60): NOTHING if row.get(name) is None else f"{row[name]:.1%}" for name in asked}
        shown.append(cells | {plain(name, 60): f"{value:.4g}" for name, value in row["metrics"].items()})
    if not now.job.limits:
        for cells in shown:
            del cells["limits"]
    return shown


def _title(row: Mapping[str, Any], *, own: bool, several: bool) -> str:
    if row["role"] == "uniform":
        return f"{plain(row['label'] or 'one level', 60)} everywhere"
    role = "reference" if own and row["role"] == "dense" else ROLES.get(row["role"], row["role"])
    return " · ".join([role, *(plain(part, 60) for part in (row["label"], row["point"] if several else None) if part)])
