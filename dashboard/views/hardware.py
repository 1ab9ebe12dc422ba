"""Workers, the queues that they take from, and how fast operations were measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.figures.roofline import draw_roofline
from autoeff.dashboard.live_news import tell
from autoeff.dashboard.plant import operation_of, queues_of, workers_of
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import show
from autoeff.dashboard.words import markdown, plain
from autoeff.errors import Unavailable

__all__ = ["draw"]

_LOOK_S = 5.0
_MOST = 5000


def draw(found: Visitor) -> None:
    """Who evaluates, and how fast."""
    st.title("Hardware")
    tables = found.client.kernel_latencies(limit=_MOST).items  # asked first: that nobody answers is said once

    @st.fragment(key="workers")
    def workers() -> None:
        with visit.guarded(found):
            _workers(found.client.hardware().items)

    workers()

    @st.fragment(run_every=_LOOK_S)
    def look() -> None:
        with visit.guarded(found):
            tell("workers", _mark(found))

    look()
    _latencies(tables)


def _mark(found: Visitor) -> str:
    """Changes with whatever is to be seen of the workers, or that the server does not answer."""
    try:
        rows = workers_of(found.client.hardware().items, datetime.now(UTC))
    except Unavailable:
        return "away"
    return f"{hash(str(rows))}"


def _workers(items: Sequence[Any]) -> None:
    alive = [worker for worker in items if worker.alive]
    columns = st.columns(3)
    columns[0].metric("workers", len(alive))
    columns[1].metric("busy", sum(worker.busy for worker in alive))
    columns[2].metric("lost in the last day", len(items) - len(alive))
    if not items:
        with st.container(border=True):
            st.write("No worker was seen in the last day: nothing that is submitted is evaluated. This starts one:")
            st.code("autoeff worker --queues cpu", language="sh")
        return
    if not alive:
        st.warning(
            "No worker is alive: what is submitted waits. What a lost one was doing is given to the next.", icon=":material/warning:"
        )
    st.dataframe(workers_of(items, datetime.now(UTC)), hide_index=True, height="content", key="workers_table")
    queues = queues_of(items)
    if queues:
        st.subheader("Queues")
        st.dataframe(queues, hide_index=True, height="content", width="content", key="queues")


def _latencies(tables: Sequence[Any]) -> None:
    st.subheader("Measured operations")
    if not tables:
        with st.container(border=True):
            st.write("Nothing was measured on the server's machine yet. A search with a limit on decode_ms or prefill_ms does so.")
        return
    names = [
        f"{plain(table.device, 60)} · torch {plain(table.versions.get('torch', ''), 20)} · {plain(table.date, 20)}" for table in tables
    ]
    picked: Any = st.selectbox("Device", range(len(tables)), format_func=lambda i: names[i], key="latency_table") or 0
    table = tables[picked]
    operations = [one for row in table.items if (one := operation_of(row.operation, row.median_ns)) is not None]
    if operations:
        with st.container(border=True):
            st.markdown(f"**Roofline** of the linears on {markdown(table.device)}")
            roofline = draw_roofline(operations, visit.colours(), revision=str(picked))
            show(roofline, "roofline", "Speed of operations over operations per byte")
    wanted = st.text_input("Only operations with", placeholder="linear_wq bits=4", key="latency_filter")
    rows = [
        {
            "operation": plain(row.operation),
            "median, µs": row.median_ns / 1e3,
            "low, µs": row.low_ns / 1e3,
            "high, µs": row.high_ns / 1e3,
            "rounds": row.rounds,
        }
        for row in table.items
        if all(word in row.operation for word in wanted.split())
    ]
    times = {title: st.column_config.NumberColumn(format="%.2f") for title in ("median, µs", "low, µs", "high, µs")}
    st.dataframe(rows, hide_index=True, height=360, key="latencies", column_config=times)
    st.caption(
        f"{len(rows):,} of {table.total:,} operations; median and quartiles over rounds."
        + (f" Torch threads: {table.threads}." if table.threads else "")
    )
