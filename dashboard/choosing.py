"""Which job a page is about: the one in its address, the one that was opened last, or the newest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.words import age, plain, short_model
from autoeff.errors import Unavailable

__all__ = ["chosen_job"]

_OFFERED = 50
_WIDE = 22
"""Letters for which there is room before an age."""


def chosen_job(found: Visitor) -> str | None:
    """The job of this page, once the reader has one; a list to choose another from stands beside it."""
    jobs = _offered(found)
    wanted = st.query_params.get("job") or st.session_state.get("job")
    if not jobs and wanted is None:
        with st.container(border=True):
            st.subheader("No searches yet")
            st.write("Once there is one, it is shown here.")
            if found.may_write and st.button("Submit a search", type="primary", icon=":material/add_circle:"):
                st.switch_page(st.session_state["pages"]["submit"])
        return None
    offered = {job.job: _words(job) for job in jobs}
    if wanted is None:
        wanted = jobs[0].job
    if wanted not in offered:
        offered = {wanted: plain(wanted, 20), **offered}
    st.session_state["picked"] = st.session_state["job"] = wanted
    if st.query_params.get("job") != wanted:
        st.query_params["job"] = wanted
    with st.sidebar:
        st.selectbox("Job", list(offered), key="picked", format_func=lambda name: offered[name], on_change=_pick)
    return str(wanted)


def _offered(found: Visitor) -> Sequence[Any]:
    """The newest jobs, or while the server does not answer, those that were."""
    try:
        st.session_state["offered"] = found.client.job_page(limit=_OFFERED).items
    except Unavailable:
        if "offered" not in st.session_state:
            raise
    jobs: Sequence[Any] = st.session_state["offered"]
    return jobs


def _pick() -> None:
    st.query_params["job"] = st.session_state["job"] = st.session_state["picked"]


def _words(job: Any) -> str:
    name = f"{short_model(job.model).rpartition('/')[2]} · {', '.join(job.limits) or 'no limits'}"
    return f"{plain(name, _WIDE)} · {age(job.created, datetime.now(UTC)).removesuffix(' ago')}"
