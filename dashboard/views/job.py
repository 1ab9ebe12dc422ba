"""One search: what it finds while it finds it, and every trial behind that."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.choosing import chosen_job
from autoeff.dashboard.exporting import files
from autoeff.dashboard.fetch import Snapshot
from autoeff.dashboard.figures.front import draw_front
from autoeff.dashboard.figures.progress import draw_best, draw_progress
from autoeff.dashboard.form import yaml_of
from autoeff.dashboard.live_chart import live_chart
from autoeff.dashboard.live_news import tell
from autoeff.dashboard.outline import (
    Pace,
    bests_over,
    bounds_of,
    dominated_over,
    dots_of,
    front_of,
    guests_of,
    is_open,
    pace_of,
    rivals_of,
    verdict,
)
from autoeff.dashboard.panels import baselines, damage, importance, trials
from autoeff.dashboard.steering import buttons
from autoeff.dashboard.theme import Palette
from autoeff.dashboard.visit import Visitor, open_trial
from autoeff.dashboard.watching import CHART, ground_of, mark_of, watched
from autoeff.dashboard.words import STATES, axis, duration, figure, markdown, plain, short_model, titled
from autoeff.errors import NotFound

__all__ = ["draw"]

_COSTS = 2
"""Limited costs that are shown above the charts."""
_LOOK_S = 5.0
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

    @st.fragment(key="picture")
    def picture() -> None:
        with visit.guarded(found):
            with st.container():  # what comes and goes has a place, so that the charts keep theirs and are not made anew
                shown = watched(found, job_id)
            _picture(found, shown)
            if shown.job.state != now.job.state:  # what may be done to it has changed
                st.rerun()

    picture()
    if is_open(now.job):

        @st.fragment(run_every=_SELDOM_S if now.job.state == "paused" else _LOOK_S)
        def look() -> None:
            with visit.guarded(found):
                try:
                    tell("picture", mark_of(found, job_id))
                except NotFound:  # the whole page says so
                    st.rerun()

        look()
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
    job, palette, ground = now.job, visit.colours(), ground_of(found, now.job)
    pace, bounds = pace_of(job, datetime.now(UTC)), bounds_of(now, ground)
    with st.container():  # which may be empty, and yet has its place: charts below would be made anew where it comes and goes
        _summary(now)
    _figures(now, pace, bounds)
    with st.container():
        if is_open(job):
            st.progress(pace.share)
    if not now.whole:
        with st.container(border=True):
            if is_open(job):
                st.write("Nothing is measured yet. Points appear here as soon as the first evaluation has ended.")
            else:
                st.write("It ended before anything was measured.")
            if job.driven_by is None and job.state in ("pending", "running"):
                st.write("Nobody drives this job yet: is a coordinator running? `autoeff serve` starts one.")
        return
    state = (job.job, job.version, job.events, palette.name)

    def front() -> go.Figure:
        return draw_front(
            dots_of(now), front_of(now), guests_of(now), palette, quality=job.quality, cost=job.judged_cost,
            limit=bounds.get(job.judged_cost), method=now.method, linear=now.own, revision=job.job,
        )  # fmt: skip

    left, right = st.columns([5, 3])
    with left, st.container(border=True):
        st.markdown(f"**The front**: {markdown(job.quality)} over {markdown(job.judged_cost)}")
        clicked = live_chart(front, state, "front", CHART, _alt(now))
        if clicked is not None:
            st.session_state["clicked"] = clicked
        if (trial := st.session_state.get("clicked")) is not None:
            if st.button(f"Open trial {trial}", icon=":material/grid_on:", key="open_clicked"):
                del st.session_state["clicked"]
                open_trial(job.job, trial)
        else:
            st.caption("Click a point to open its configuration; drag to zoom, double-click to see everything again.")
    with right, st.container(border=True):
        _progress(now, palette, state, limited=job.judged_cost in bounds or (now.own and bool(job.limits)))


def _progress(now: Snapshot, palette: Palette, state: Hashable, *, limited: bool) -> None:
    """What was found by then: within limits the best counts, without them the front as a whole."""
    job, best = now.job, "best so far"
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown("**Progress**", width="stretch")
        shown = st.segmented_control(
            "Shown", [best, "dominated"], default=best, key="progress_of", label_visibility="collapsed", required=True,
            help="Of the picture, the share that the front dominates.",
        ) if limited else "dominated"  # fmt: skip
    over = st.session_state.get("progress_over", "trials")

    def chart() -> go.Figure:
        revision = f"{job.job} {shown} {over}"
        if shown == best:
            steps, unit = bests_over(now, over)
            if steps:
                return draw_best(steps, rivals_of(now), palette, quality=job.quality, title=unit, linear=now.own, revision=revision)
        steps, unit = dominated_over(now, over)
        return draw_progress(steps, palette, title=unit, revision=revision)

    live_chart(chart, (state, shown, over), "progress", CHART, plain(f"{shown} over {over}"))
    st.segmented_control("Over", ["trials", "time"], default="trials", key="progress_over", label_visibility="collapsed", required=True)


def _summary(now: Snapshot) -> None:
    """What was found and whether it is better than what anybody has without a search; and the ways on."""
    job, front = now.job, now.front
    if front.best is None:
        return
    ended = not is_open(job)
    title = ("Found" if ended else "Best so far") if front.feasible else "The closest to the limits"
    compared = [
        f"{share:.0%} less{'' if i else ' ' + job.quality} than {name}" if share >= 0.005 else f"no better than {name}"
        for i, (name, share) in enumerate(verdict(now))
    ]
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        text = f"**{title}: trial {front.best}**" + (f", {markdown(' and '.join(compared), 300)}" if compared else "")
        st.markdown(text, width="stretch")
        if st.button("Open it", type="primary", icon=":material/grid_on:", key="open_best", help="Layer by layer, and its export."):
            open_trial(job.job, front.best)


def _figures(now: Snapshot, pace: Pace, bounds: Mapping[str, float]) -> None:
    """The best's quality, its costs beside their limits, and the effort."""
    job, best = now.job, now.best
    names = list(bounds)[:_COSTS] or [job.judged_cost]
    columns = iter(st.columns(3 + len(names)))
    next(columns).metric(markdown(titled(job.quality)), figure(job.quality, now.front.best_quality))
    for name in names:
        cost = None if best is None or name not in best.measurements else best.measurements[name].value
        said = f"of {figure(name, bounds[name])} allowed" if name in bounds else None
        next(columns).metric(markdown(titled(name)), figure(name, cost), said, delta_color="off", delta_arrow="off")
    trials = f"{job.trials:,} trials" + (f", {job.failed} failed" if job.failed else "")
    next(columns).metric("evaluations", f"{job.used:.4g} of {job.budget}", trials, delta_color="off", delta_arrow="off")
    left = f"about {duration(pace.left_s)} left" if pace.left_s else None
    next(columns).metric("time", duration(pace.elapsed_s), left, delta_color="off", delta_arrow="off")


def _alt(now: Snapshot) -> str:
    job = now.job
    return plain(f"{axis(job.quality)} over {axis(job.judged_cost)} of {len(now.whole)} trials, {len(now.front.items)} on the front", 300)
