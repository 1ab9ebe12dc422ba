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
from autoeff.dashboard.outline import dots_of, front_of, guests_of, is_open, limit_of, pace_of, steps_by_trial, verdict
from autoeff.dashboard.panels import baselines, damage, importance, trials
from autoeff.dashboard.steering import buttons
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import CHART, ground_of, watched
from autoeff.dashboard.words import STATES, axis, duration, figure, markdown, plain, short_model

__all__ = ["draw"]

_LOOK_S = 2.0


def draw(found: Visitor) -> None:
    """The page of the job that was chosen."""
    job_id = chosen_job(found)
    if job_id is None:
        return
    now = watched(found, job_id)
    _head(found, now)
    live = is_open(now.job)

    @st.fragment(run_every=_LOOK_S if live else None)
    def picture() -> None:
        with visit.guarded(found):
            shown = watched(found, job_id)
            _picture(found, shown)
            if live and not is_open(shown.job):
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
    "succeeded": "green",
    "failed": "red",
    "cancelled": "gray",
}


def _picture(found: Visitor, now: Snapshot) -> None:
    job, palette = now.job, visit.colours()
    pace = pace_of(job, datetime.now(UTC))
    _figures(now, pace)
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
        st.plotly_chart(front, theme=None, key="front", config=CHART, alt=_alt(now))
    with right, st.container(border=True):
        st.markdown("**Progress**: share that the front dominates")
        st.plotly_chart(
            draw_progress(steps_by_trial(now), palette, title="trial", revision=job.job), theme=None, key="progress", config=CHART
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
