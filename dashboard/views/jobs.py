"""Every search of the key's owner: where it stands, how long it takes yet, what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.fetch import Best, bests
from autoeff.dashboard.outline import pace_of
from autoeff.dashboard.steering import buttons
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.words import NOTHING, STATES, age, duration, figure, plain, short_model
from autoeff.errors import Unavailable

__all__ = ["draw", "rows_of"]

_PAGE = 25
_MOST = 500
_LOOK_S = 5.0
_MOVING = frozenset({"pending", "running", "cancelling"})
"""States that change without anybody's doing."""


def draw(found: Visitor) -> None:
    """The list, with what can be done to the jobs that are chosen in it."""
    st.title("Jobs")
    states = st.pills(
        "State",
        list(STATES),
        selection_mode="multi",
        key="job_states",
        format_func=lambda s: f"{STATES[s]} {s}",
        width="stretch",
        label_visibility="collapsed",
    )
    jobs = _asked(found, states)
    if not jobs:
        _empty(found, bool(states))
        return
    live = any(job.state in _MOVING for job in jobs)

    @st.fragment(run_every=_LOOK_S if live else None)
    def table() -> None:
        with visit.guarded(found):
            _table(found, states)

    table()


def _table(found: Visitor, states: Sequence[str]) -> None:
    jobs = _asked(found, states)
    first = 0
    if len(jobs) > _PAGE:
        pages = -(-len(jobs) // _PAGE)
        first = _PAGE * (st.number_input(f"Page of {pages}", 1, pages, key="jobs_page", width=120) - 1)
    shown = jobs[first : first + _PAGE]
    place = st.container()
    state = st.dataframe(
        rows_of(shown, _bests(found, shown), datetime.now(UTC)),
        key=f"jobs_{first}_{'-'.join(states)}",
        hide_index=True,
        row_height=36,
        height="content",
        on_select="rerun",
        selection_mode="multi-row",
        column_config={
            "progress": st.column_config.ProgressColumn("progress", format="percent", min_value=0, max_value=1, width="small"),
            "job": st.column_config.TextColumn("job", help="Its id, as the command line takes it.", width=110),
        },
    )
    chosen = [shown[i] for i in state["selection"]["rows"] if i < len(shown)]
    with place, st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if not chosen:
            st.caption("Choose a row to open or steer a job, several to compare them.")
        elif len(chosen) == 1:
            if st.button("Open", type="primary", icon=":material/monitoring:", key="open"):
                visit.open_job(chosen[0].job)
            buttons(found, chosen[0])
        elif st.button(f"Compare {len(chosen)} jobs", type="primary", icon=":material/stacked_line_chart:", key="compare"):
            st.session_state["compared"] = [job.job for job in chosen]
            st.switch_page(st.session_state["pages"]["compare"])
    if len(jobs) == _MOST:
        st.caption(f"The newest {_MOST} are shown; `autoeff ls` lists all.")


def rows_of(jobs: Sequence[Any], best: Mapping[str, Best], now: datetime) -> list[dict[str, Any]]:
    """The table: one row a job, everything somebody typed as plain text."""
    rows = []
    for job in jobs:
        pace, one = pace_of(job, now), best.get(job.job)
        rows.append(
            {
                "state": job.state,
                "model": short_model(job.model),
                "limits": plain(", ".join(job.limits) or "none", 80),
                "progress": round(pace.share, 2),
                "evaluations": f"{job.used:.4g} of {job.budget}",
                "best": NOTHING
                if one is None or one.value is None
                else f"{plain(one.quality, 20)} {figure(one.quality, one.value)}" + ("" if one.feasible else " (over the limit)"),
                "time": duration(pace.elapsed_s) + (f", about {duration(pace.left_s)} left" if pace.left_s else ""),
                "submitted": age(job.created, now),
                "job": job.job,
            }
        )
    return rows


def _asked(found: Visitor, states: Sequence[str]) -> list[Any]:
    try:
        jobs = list(found.client.job_page(states, limit=_MOST).items)
    except Unavailable:
        if not (known := st.session_state.get("jobs_known")):
            raise
        st.warning(
            "The server cannot be reached just now; this is the list as it was. It is asked again by itself.", icon=":material/cloud_off:"
        )
        return list(known)
    st.session_state["jobs_known"] = jobs
    return jobs


def _bests(found: Visitor, jobs: Sequence[Any]) -> Mapping[str, Best]:
    """Asked only for jobs that have moved since they were last shown."""
    known: dict[str, tuple[object, Best]] = st.session_state.setdefault("bests", {})
    moved = [job for job in jobs if known.get(job.job, (None,))[0] != (job.used, job.state)]
    marks = {job.job: (job.used, job.state) for job in moved}
    known.update({name: (marks[name], one) for name, one in bests(found.client, moved).items()})
    return {job.job: known[job.job][1] for job in jobs if job.job in known}


def _empty(found: Visitor, filtered: bool) -> None:
    with st.container(border=True):
        if filtered:
            st.write("No job is in these states. Choose others above, or none to see all.")
            return
        st.subheader("No searches yet")
        if found.may_write:
            st.write("Submit one here, or from a shell:")
        else:
            st.write("This key may read, and its owner has no searches. Whoever has a key that may write starts one so:")
        st.code("autoeff search demo --knobs bits,skip --limit 'avg_bits<=3.5' --trials 150", language="sh")
        if found.may_write and st.button("Submit a search", type="primary", icon=":material/add_circle:"):
            st.switch_page(st.session_state["pages"]["submit"])
