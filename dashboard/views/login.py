"""The page that asks for a key."""

from __future__ import annotations

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.words import markdown, sentence
from autoeff.errors import AutoeffError

__all__ = ["draw"]


def draw() -> None:
    """Asks for a key, and says why the last one is not good any more."""
    _, middle, _ = st.columns([1, 1.2, 1])
    with middle:
        st.title("autoeff")
        st.write("See what the searches found, choose, steer and export.")
        told = st.session_state.get("told")
        if told:
            st.warning(markdown(told, 800), icon=":material/lock:")
        with st.form("key", border=True):
            st.caption(f"Server: {markdown(visit.server(), 80)}")
            text = st.text_input("Key", type="password", placeholder="ae_…", autocomplete="current-password")
            given = st.form_submit_button("Log in", type="primary", width="stretch")
        if given:
            try:
                visit.log_in(text)
            except AutoeffError as error:
                st.error(markdown(sentence(error), 800), icon=":material/error:")
                return
            st.session_state["told"] = None
            st.rerun()
        st.caption("`autoeff serve` prints the first key of a machine; `autoeff keys create` makes others.")
