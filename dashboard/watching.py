"""The job that a page shows, kept between runs of the page so that what has not changed is not asked for again."""

from __future__ import annotations

import time
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from autoeff.dashboard.fetch import Snapshot, Terrain, snapshot, terrain
from autoeff.dashboard.visit import Visitor
from autoeff.errors import Unavailable

__all__ = ["CHART", "ground_of", "mark_of", "show", "trial_of", "watched"]

CHART: dict[str, Any] = {
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
    "scrollZoom": False,
}
"""What the bar above a chart offers."""
_TRIALS_KEPT = 64


def watched(found: Visitor, job_id: str) -> Snapshot:
    """The job as it is now, or while the server does not answer, as it was.

    Raises:
        AutoeffError: It is gone, or the server is not reached and nothing is known yet.
    """
    before: Snapshot | None = st.session_state.get("snapshot")
    before = before if before is not None and before.job.job == job_id else None
    try:
        now = snapshot(found.client, job_id, before)
    except Unavailable:
        if before is None:
            raise
        st.warning(
            "The server cannot be reached just now; this is what was known before. It is asked again by itself.",
            icon=":material/cloud_off:",
        )
        return before
    st.session_state["snapshot"] = now
    return now


def mark_of(found: Visitor, job_id: str) -> str:
    """Changes with whatever is to be seen of a job: its state, its trials, the minutes, or that the server does not answer."""
    before: Snapshot | None = st.session_state.get("snapshot")
    known = before.job if before is not None and before.job.job == job_id else None
    try:
        job = found.client.job(job_id, known)
    except Unavailable:
        return "away"
    return f"{job.job} {job.version} {job.events} {time.time() // 60:.0f}"


def show(drawn: go.Figure, key: str, alt: str) -> None:
    """Shows a chart that needs not keep what the reader did to it; one that has a width of its own keeps that."""
    width: Any = "stretch" if drawn.layout.width is None else "content"
    st.plotly_chart(drawn, theme=None, key=key, config=CHART, width=width, alt=alt)


def ground_of(found: Visitor, job: Any) -> Terrain | None:
    """What the job searches: it never changes, so it is asked for once."""
    known: tuple[str, Terrain | None] = st.session_state.get("terrain", ("", None))
    if known[0] != job.job:
        known = (job.job, terrain(found.client, job))
        st.session_state["terrain"] = known
    return known[1]


def trial_of(found: Visitor, job: Any, number: int) -> Any:
    """A trial with its attempts, asked for again only once something has happened to its job."""
    kept: dict[tuple[str, int, int], Any] = st.session_state.setdefault("trials", {})
    key = (job.job, number, job.events)
    if key not in kept:
        if len(kept) >= _TRIALS_KEPT:
            kept.clear()
        kept[key] = found.client.trial(job.job, number)
    return kept[key]
