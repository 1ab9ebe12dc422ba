"""One search: what it finds while it finds it, and every trial behind that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.choosing import chosen_job
from autoeff.dashboard.exporting import files
from autoeff.dashboard.fetch import Snapshot
from autoeff.dashboard.figures.front import draw_front
from autoeff.dashboard.figures.progress import draw_progress
from autoeff.dashboard.form import yaml_of
from autoeff.dashboard.live_chart import live_chart
from autoeff.dashboard.outline import dots_of, front_of, guests_of, is_open, limit_of, pace_of, steps_by_time, steps_by_trial, verdict
from autoeff.dashboard.panels import baselines, damage, importance, trials
from autoeff.dashboard.steering import buttons
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import CHART, ground_of, watched
from autoeff.dashboard.words import STATES, axis, duration, figure, markdown, plain, short_model

__all__ = ["draw"]

_LOOK_S = 2.0
_SELDOM_S = 60.0
"""Of a paused job, which only somebody's resuming it can change."""


def draw(found: Visitor) -> None:
    """The page of the job that was chosen."""
    job_id = chosen_job(found)
    if job_id is None:
        return
    with st.container():
        now = watched(found, job_id)
        _head(found, now)
    often = (_SELDOM_S if now.job.state == "paused" else _LOOK_S) if is_open(now.job) else None

    @st.fragment(run_every=often)
    def picture() -> None:
        with visit.guarded(found):
            with st.container():  # what comes and goes has a place, so that the charts keep theirs and are not made anew
                shown = watched(found, job_id)
            _picture(found, shown)
            if shown.job.state != now.job.state:  # what may be done to it has changed
                st.rerun()

    picture()
    _panels(found, now)


def _panels(found: Visitor, now: Snapshot) -> None:
    """What one looks at less often, each drawn only while its tab is open."""
    tabs = st.tabs(["Baselines", "Damage map", "Importance", "Trials", "Job file", "Files"], key="job_tab", on_change="rerun")

    @st.fragment
    def trials_panel() -> None:
        with visit.guarded(found):
            trials.draw(found, now)

    ground = ground_of(found, now.job)
    panels: Sequence[Callable[[], None]] = (
        lambda: baselines.draw(now),
        lambda: damage.draw(found, now, ground),
        lambda: importance.draw(found, now, ground),
        trials_panel,
        lambda: _job_file(now),
        lambda: files(found, now.job),
    )
    for tab, draw_panel in zip(tabs, panels, strict=True):
        if tab.open:
            with tab:
                draw_panel()


def _job_file(now: Snapshot) -> None:
    text = yaml_of(now.job.spec)
    st.code(text, language="yaml")
    st.download_button("job.yaml", text, f"{now.job.job}.yaml", "application/yaml", icon=":material/download:", on_click="ignore")


def _head(found: Visitor, now: Snapshot) -> None:
    job = now.job
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.title(markdown(short_model(job.model)), width="content")
        st.badge(job.state, icon=STATES[job.state], color=_COLOURS[job.state])
        st.space("stretch")
        buttons(found, job)
    limits = ", ".join(job.limits) or "no limits"
    st.caption(markdown(f"{limits} · {', '.join(job.spec.get('knobs', {})) or 'own code'} · job {job.job}", 400))
    if job.error:
        st.error(markdown(job.error, 800), icon=":material/error:")


_COLOURS: dict[str, Any] = {
    "pending": "gray",
    "running": "blue",
    "paused": "orange",
    "cancelling": "orange",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "gray",
}


def _picture(found: Visitor, now: Snapshot) -> None:
    job, palette = now.job, visit.colours()
    pace = pace_of(job, datetime.now(UTC))
    _figures(now, pace)
    with st.container():
        if is_open(job):
            st.progress(pace.share)
    if not now.whole:
        with st.container(border=True):
            st.write("Nothing is measured yet. Points appear here as soon as the first evaluation has ended.")
            if job.driven_by is None and job.state in ("pending", "running"):
                st.write("Nobody drives this job yet: is a coordinator running? `autoeff serve` starts one.")
        return
    ground = ground_of(found, job)
    left, right = st.columns([5, 3])
    with left, st.container(border=True):
        st.markdown(f"**The front**: {markdown(job.quality)} over {markdown(job.judged_cost)}")
        front = draw_front(
            dots_of(now), front_of(now), guests_of(now), palette,
            quality=job.quality, cost=job.judged_cost, limit=limit_of(now, ground), method=now.method, linear=now.own, revision=job.job,
        )  # fmt: skip
        clicked = live_chart(front, "front", CHART, _alt(now))
        if clicked is not None:
            st.session_state["clicked"] = clicked
        if (trial := st.session_state.get("clicked")) is not None:
            if st.button(f"Open trial {trial}", icon=":material/grid_on:", key="open_clicked"):
                del st.session_state["clicked"]
                st.switch_page(st.session_state["pages"]["configuration"], query_params={"job": job.job, "trial": str(trial)})
        else:
            st.caption("Click a point to open its configuration; drag to zoom, double-click to see everything again.")
    with right, st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown("**Progress**", width="stretch")
            over = st.segmented_control(
                "Over", ["trials", "time"], default="trials", key="progress_over", label_visibility="collapsed", required=True
            )
        steps, unit = (steps_by_trial(now), "trial") if over == "trials" else steps_by_time(now)
        live_chart(
            draw_progress(steps, palette, title=unit, revision=f"{job.job} {over}"), "progress", CHART, f"Dominated share over {over}"
        )


def _figures(now: Snapshot, pace: Any) -> None:
    job, front = now.job, now.front
    columns = st.columns(5)
    against = verdict(now)
    title = f"best {job.quality}" if front.feasible or front.best is None else f"closest {job.quality}"
    columns[0].metric(
        markdown(title), figure(job.quality, front.best_quality),
        f"-{against[1]['quality']:.0%} against {markdown(against[0])}" if against and against[1]["quality"] > 0 else None,
        delta_color="inverse", delta_arrow="down",
    )  # fmt: skip
    best = now.best
    cost = None if best is None or job.judged_cost not in best.measurements else best.measurements[job.judged_cost].value
    columns[1].metric(markdown(f"its {job.judged_cost}"), figure(job.judged_cost, cost))
    columns[2].metric("trials", f"{job.trials:,}", f"{job.failed} failed" if job.failed else None, delta_color="off", delta_arrow="off")
    columns[3].metric("evaluations", f"{job.used:.4g} of {job.budget}")
    left = f"about {duration(pace.left_s)} left" if pace.left_s else None
    columns[4].metric("time", duration(pace.elapsed_s), left, delta_color="off", delta_arrow="off")


def _alt(now: Snapshot) -> str:
    job = now.job
    return plain(f"{axis(job.quality)} over {axis(job.judged_cost)} of {len(now.whole)} trials, {len(now.front.items)} on the front", 300)
