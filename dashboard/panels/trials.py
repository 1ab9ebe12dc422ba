"""Every trial of a job in pages, and one of them with its attempts and logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from autoeff.dashboard.fetch import Snapshot
from autoeff.dashboard.visit import Visitor, open_trial
from autoeff.dashboard.watching import trial_of
from autoeff.dashboard.words import duration, figure, markdown, plain

__all__ = ["draw", "plain_log", "rows_of"]

_PAGE = 50
_STATES = ("succeeded", "failed", "quarantined", "running", "queued")
_ORIGINS = ("dense", "uniform", "table", "seed", "additive", "random", "searched", "given")


def draw(found: Visitor, now: Snapshot) -> None:
    """Filters, a page of rows, and the row that was chosen."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        states = st.multiselect("State", _STATES, key="trial_states", placeholder="all", width=260)
        origin = st.selectbox("Proposed by", _ORIGINS, index=None, key="trial_origin", placeholder="all", width=200)
        behind = _place((now.job.job, tuple(states), origin))
        st.button("First", icon=":material/first_page:", key="trials_first", disabled=not behind, on_click=behind.clear)
        st.button("Back", icon=":material/chevron_left:", key="trials_back", disabled=not behind, on_click=_back, args=(behind,))
        page = found.client.trial_page(now.job.job, states, origin, limit=_PAGE, cursor=behind[-1] if behind else None)
        last = page.next is None or len(page.items) < _PAGE
        st.button("Next", icon=":material/chevron_right:", key="trials_next", disabled=last, on_click=behind.append, args=(page.next,))
    if not page.items:
        st.write("No trial is like that." if states or origin or behind else "No trial was proposed yet.")
        return
    state = st.dataframe(
        rows_of(page.items, now),
        key=f"trials_{len(behind)}",
        hide_index=True,
        height=420,
        on_select="rerun",
        selection_mode="single-row",
    )
    st.caption(f"Trials {page.items[0].trial} to {page.items[-1].trial} of {now.job.trials:,}. Choose a row to see its attempts and logs.")
    chosen = [page.items[i] for i in state["selection"]["rows"] if i < len(page.items)]
    if chosen:
        _one(found, now, chosen[0].trial)


def rows_of(items: Sequence[Any], now: Snapshot) -> list[dict[str, Any]]:
    """The table: one row a trial, texts as plain text; no column that is empty."""
    labelled, failed = any(row.label for row in items), any(row.failure for row in items)
    rows = []
    for row in items:
        cells: dict[str, Any] = {"trial": row.trial, "proposed by": row.origin}
        if labelled:
            cells["label"] = plain(row.label or "", 60)
        cells["state"] = row.state
        cells |= {
            title: figure(name, None if (m := row.measurements.get(name)) is None else m.value) for name, title in columns_of(now).items()
        }
        if failed:
            cells["failure"] = "" if row.failure is None else plain(f"{row.failure.kind}: {row.failure.message}", 200)
        rows.append(cells)
    return rows


def _place(filters: object) -> list[str]:
    """Cursors of the pages that were turned, forgotten when the filters change."""
    kept = st.session_state.get("trials_place")
    if kept is None or kept[0] != filters:
        kept = st.session_state["trials_place"] = (filters, [])
    behind: list[str] = kept[1]
    return behind


def _back(behind: list[str]) -> None:
    if behind:
        behind.pop()


def _one(found: Visitor, now: Snapshot, number: int) -> None:
    trial = trial_of(found, now.job, number)
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**Trial {number}**, {markdown(trial.origin)}, {markdown(trial.state)}", width="content")
            if st.button("Open its configuration", icon=":material/grid_on:", key="trials_open"):
                open_trial(now.job.job, number)
        st.caption(f"Digest {trial.digest}")
        if trial.failure is not None:
            st.error(markdown(f"{trial.failure.kind}: {trial.failure.message}", 800), icon=":material/error:")
        for count, attempt in enumerate(trial.attempts, start=1):
            ended = f"{attempt.outcome}, {duration(attempt.seconds)}" if attempt.outcome else "running"
            st.text(
                f"Attempt {count}: {ended}, from {attempt.started} by {plain(attempt.worker, 80)}"
                + ("" if attempt.accepted or not attempt.outcome else " (came too late, not counted)")
            )
            if attempt.log:
                st.code(plain_log(attempt.log), language=None, height=240)


def plain_log(text: str) -> str:
    """A log as it is, but for characters that would not be seen."""
    return "\n".join(plain(line, 2000) for line in text[-200_000:].splitlines())


def columns_of(now: Snapshot) -> dict[str, str]:
    """Measurements worth a column, with what to write above them."""
    quality = now.job.quality
    held_out = {} if now.own else {f"{quality}_held_out": f"{quality} held out"}
    return {**{name: plain(title, 60) for name, title in now.job.columns.items()}, quality: quality, **held_out}
