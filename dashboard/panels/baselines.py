"""What was found, beside the baselines that every search is judged by."""

from __future__ import annotations

from typing import Any

import streamlit as st

from autoeff.dashboard.fetch import Snapshot
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
            st.write("The baselines are measured first: the dense model, and every level everywhere. They appear here.")
            return
        st.dataframe(rows, hide_index=True, height="content")
        st.caption("The end table stands here when the search has ended.")
        return
    st.dataframe(table_of(now), hide_index=True, height="content")
    st.caption(
        "Lower is better, except for Spearman. Quality is measured against the dense model; finalists are confirmed on held-out text."
    )


def table_of(now: Snapshot) -> list[dict[str, Any]]:
    """The end table for people."""
    result: Any = now.result
    quality, columns = str(result["quality"]), now.job.columns
    confirmed = [name for name in _CONFIRMED if any(row.get(name) is not None for row in result["rows"])]
    asked = [name for name in dict.fromkeys(name for row in result["rows"] for name in row) if str(name).startswith("accuracy:")]
    rows = []
    for row in result["rows"]:
        role = "reference" if now.own and row["role"] == "dense" else ROLES.get(row["role"], row["role"])
        words = " · ".join(plain(part, 60) for part in (row["label"], row["point"]) if part)
        shown = {"configuration": f"{role} {words}".strip() + ("" if row["feasible"] else " (over the limit)"), "trial": row["trial"]}
        shown |= {plain(title, 60): figure(name, row["costs"].get(name)) for name, title in columns.items()}
        shown |= {quality: figure(quality, row["search"])}
        if not now.own:
            shown |= {f"{quality} held out": figure(quality, row["held_out"])}
        shown |= {name.replace("_held_out", " held out"): figure(name, row[name]) for name in confirmed}
        shown |= {plain(name, 60): NOTHING if row.get(name) is None else f"{row[name]:.1%}" for name in asked}
        rows.append(shown | {plain(name, 60): f"{value:.4g}" for name, value in row["metrics"].items()})
    return rows
