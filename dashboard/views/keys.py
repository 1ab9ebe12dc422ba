"""Keys, for those who may make them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.words import NOTHING, age, markdown, plain, sentence
from autoeff.errors import AutoeffError

__all__ = ["draw", "rows_of"]

_SCOPES = {"jobs:read": "see jobs", "jobs:write": "start and steer jobs", "admin": "make keys and see the plant"}


def draw(found: Visitor) -> None:
    """The keys, a form for another one, and the end of those that are not needed any more."""
    st.title("Keys")
    if not found.is_admin:
        st.info("This key may not see keys: it lacks the scope admin.", icon=":material/lock:")
        return
    _made()
    keys = found.client.keys()
    state = st.dataframe(
        rows_of(keys, datetime.now(UTC)),
        key="keys_table",
        hide_index=True,
        height="content",
        on_select="rerun",
        selection_mode="single-row",
    )
    chosen = [keys[i] for i in state["selection"]["rows"] if i < len(keys)]
    if chosen and chosen[0].revoked is None:
        if chosen[0].key == found.key.key:
            st.caption("This is the key that you are logged in with; it cannot end itself.")
        elif st.button(f"Revoke {chosen[0].key}", icon=":material/key_off:", key="revoke"):
            _revoke(found, chosen[0])
    else:
        st.caption("Choose a row to end a key.")
    _form(found)


def rows_of(keys: Sequence[Any], now: datetime) -> list[dict[str, Any]]:
    """The table: one row a key, names as plain text."""
    return [
        {
            "key": key.key,
            "name": plain(key.name, 80),
            "owner": plain(key.owner),
            "may": ", ".join(key.scopes),
            "made": age(key.created, now),
            "expires": NOTHING if key.expires is None else key.expires[:10],
            "last used": "never" if key.last_used is None else age(key.last_used, now),
            "state": "good" if key.revoked is None else f"revoked {age(key.revoked, now)}",
        }
        for key in keys
    ]


def _made() -> None:
    """The text of the key that was made last, until it is put away."""
    if (made := st.session_state.get("key_made")) is None:
        return
    with st.container(border=True):
        st.success(f"Key {made.key} was made. Copy it now: it is not shown again.", icon=":material/key:")
        st.code(made.text, language=None)
        if st.button("I have it", key="key_kept"):
            del st.session_state["key_made"]
            st.rerun()


def _form(found: Visitor) -> None:
    with st.form("make_key", border=True):
        st.subheader("Make a key")
        left, middle, right = st.columns([2, 2, 1])
        name = left.text_input("Name", max_chars=80, help="For people: what it is for.")
        owner = middle.text_input("Owner", found.key.owner, max_chars=64, help="Whose jobs it sees.")
        days = right.number_input("Days", 1, 3650, None, placeholder="never ends")
        scopes = st.multiselect("May", list(_SCOPES), ["jobs:read"], format_func=lambda scope: f"{scope}: {_SCOPES[scope]}")
        if st.form_submit_button("Make", type="primary", icon=":material/add:"):
            try:
                st.session_state["key_made"] = found.client.make_key(name, owner, scopes, None if days is None else int(days))
            except AutoeffError as error:
                st.error(markdown(sentence(error), 600), icon=":material/error:")
                return
            st.rerun()


@st.dialog("Revoke this key?")
def _revoke(found: Visitor, key: Any) -> None:
    st.text(f"{key.key} · {plain(key.name, 80)} · {plain(key.owner)}")
    st.write("Whoever uses it is refused from then on. It cannot be undone.")
    if st.button("Revoke", type="primary", icon=":material/key_off:", key="revoke_sure"):
        try:
            found.client.revoke_key(key.key)
        except AutoeffError as error:
            st.error(markdown(sentence(error), 600), icon=":material/error:")
            return
        st.rerun()
