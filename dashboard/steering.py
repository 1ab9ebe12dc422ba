"""What can be done to a job, as buttons: those that its state and the key allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.words import markdown, plain, sentence, short_model
from autoeff.errors import AutoeffError

__all__ = ["buttons"]


def buttons(found: Visitor, job: Any) -> None:
    """Pause, resume, cancel, change the budget, clone: side by side in whatever container this is drawn into."""
    if not found.may_write:
        return
    client = found.client
    if job.state in ("pending", "running"):
        _button("Pause", ":material/pause:", lambda: client.pause(job.job), "Paused. What runs is finished.")
    if job.state in ("paused", "failed"):
        _button("Resume", ":material/play_arrow:", lambda: client.resume(job.job), "It goes on.")
    if job.state in ("running", "paused", "failed") and getattr(job, "failed", False):
        _button("Retry failed", ":material/replay:", lambda: client.retry_failed(job.job), "Failed trials are tried again.")
    if job.state in ("pending", "running", "paused"):
        if st.button("Evaluations", icon=":material/hourglass:", key="steer_budget", help="More or fewer evaluations."):
            _budget(found, job)
        if st.button("Cancel", icon=":material/stop:", key="steer_cancel"):
            _cancel(found, job)
    if st.button("Clone", icon=":material/content_copy:", key="steer_clone", help="Opens the form with this job's fields."):
        st.session_state["cloned"] = client.job(job.job).spec
        st.switch_page(st.session_state["pages"]["submit"])


def _button(word: str, icon: str, act: Callable[[], Any], done: str) -> None:
    if st.button(word, icon=icon, key=f"steer_{word.lower().replace(' ', '_')}"):
        try:
            act()
        except AutoeffError as error:
            st.toast(markdown(sentence(error), 600), icon=":material/error:")
            return
        st.toast(done, icon=":material/check:")
        st.rerun()


@st.dialog("Cancel this job?")
def _cancel(found: Visitor, job: Any) -> None:
    st.text(f"{short_model(job.model)} · {plain(', '.join(job.limits) or 'no limits', 80)}")
    st.write("What runs is stopped. What was measured stays, and the job cannot be resumed.")
    if st.button("Cancel the job", type="primary", icon=":material/stop:"):
        try:
            found.client.cancel(job.job)
        except AutoeffError as error:
            st.error(markdown(sentence(error), 600))
            return
        st.rerun()


@st.dialog("Another budget")
def _budget(found: Visitor, job: Any) -> None:
    now = found.client.job(job.job)
    trials = st.number_input(
        "Evaluations in all", 1, 100_000, int(now.budget), step=10, help="In full-token equivalents, those that are done included."
    )
    if st.button("Change", type="primary", disabled=trials == now.budget):
        try:
            found.client.change_budget(now, trials=int(trials))
        except AutoeffError as error:
            st.error(markdown(sentence(error), 600))
            return
        st.rerun()
