"""Who is looking: the key of a browser session, kept in this process alone, and what it may do."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.client import Client
from autoeff.dashboard.theme import Palette, palette
from autoeff.dashboard.words import sentence
from autoeff.errors import AutoeffError, Forbidden, NotFound, Unavailable

__all__ = ["Visitor", "colours", "guarded", "log_in", "log_out", "open_job", "open_trial", "server", "visitor"]

_DEFAULT_SERVER = "http://127.0.0.1:8423"
_TIMEOUT_S = 60.0
_ATTEMPTS = 2
"""A page says soon that nobody answers, and asks again by itself."""
_LOOK_S = 3.0


@dataclass(frozen=True)
class Visitor:
    """Somebody with a good key.

    Attributes:
        client: Speaks with that key.
        key: What the server says of it.
    """

    client: Client
    key: Any

    @property
    def may_write(self) -> bool:
        """Whether the key may start and steer searches."""
        return "jobs:write" in self.key.scopes

    @property
    def is_admin(self) -> bool:
        """Whether the key may make and end keys."""
        return "admin" in self.key.scopes


def server() -> str:
    """The address of the API."""
    return os.environ.get("AUTOEFF_SERVER") or _DEFAULT_SERVER


def visitor() -> Visitor | None:
    """Who looks at this page; None before a key was given.

    A page opened by the link that the command printed brings the key of whoever typed the command.
    """
    found: Visitor | None = st.session_state.get("visitor")
    if found is not None:
        return found
    expected, given = os.environ.get("AUTOEFF_DASHBOARD_TOKEN", ""), st.query_params.get("token", "")
    if expected and hmac.compare_digest(expected.encode(), given.encode()) and "told" not in st.session_state:
        try:
            return log_in(os.environ.get("AUTOEFF_KEY", ""))
        except AutoeffError as error:
            st.session_state["told"] = sentence(error)
    return None


def log_in(text: str) -> Visitor:
    """Lets the bearer of this key in.

    Raises:
        AutoeffError: It is no good key, or nobody answers.
    """
    client = Client(server(), text.strip(), timeout_s=_TIMEOUT_S, attempts=_ATTEMPTS)
    try:
        found = Visitor(client, client.own_key())
    except BaseException:
        client.close()
        raise
    st.session_state["visitor"] = found
    return found


def log_out(told: str | None = None) -> None:
    """Forgets the key and what it showed; `told` is said on the page that asks for another."""
    found: Visitor | None = st.session_state.get("visitor")
    st.session_state.clear()
    if found is not None:
        found.client.close()
    st.session_state["told"] = told


@contextmanager
def guarded(found: Visitor) -> Iterator[None]:
    """Turns what goes wrong in a view into a sentence, from which the page recovers by itself where it can."""
    if st.session_state.get("visitor") is not found:  # a part that draws itself again may outlive the visit by a moment
        st.rerun()
    try:
        yield
    except Forbidden as error:
        _forbidden(found, error)
    except NotFound as error:
        st.warning(f"This is not there any more: {_markdown(error)}", icon=":material/search_off:")
        if st.button("Back to the jobs", icon=":material/list:"):
            st.session_state.pop("job", None)
            st.query_params.clear()
            st.switch_page(st.session_state["pages"]["jobs"])
    except Unavailable as error:
        _away(found, error)
    except AutoeffError as error:
        st.error(_markdown(error), icon=":material/error:")


def open_job(job_id: str, page: str = "job") -> None:
    """Goes to a page about this job."""
    st.session_state["job"] = job_id
    st.switch_page(st.session_state["pages"][page], query_params={"job": job_id})


def open_trial(job_id: str, number: int) -> None:
    """Goes to the configuration of this trial."""
    st.session_state["job"] = job_id
    st.switch_page(st.session_state["pages"]["configuration"], query_params={"job": job_id, "trial": str(number)})


def colours() -> Palette:
    """Of the page as this reader sees it."""
    return palette(st.context.theme.type)


def _forbidden(found: Visitor, error: Forbidden) -> None:
    """A key that is good but may not do this stays; one that is no longer good is asked for again."""
    try:
        found.client.own_key()
    except Forbidden as refusal:
        log_out(f"{sentence(refusal)} Give another one.")
        st.rerun()
    except AutoeffError as other:  # whether the key is good cannot be asked now
        st.warning(_markdown(other), icon=":material/cloud_off:")
    st.error(_markdown(error), icon=":material/lock:")


def _away(found: Visitor, error: Unavailable) -> None:
    st.warning(f"{_markdown(error)} This page asks again by itself.", icon=":material/cloud_off:")

    @st.fragment(run_every=_LOOK_S)
    def look() -> None:
        st.caption(f"Last asked at {datetime.now(UTC).astimezone():%H:%M:%S}.")
        if st.session_state.pop("away", False) and _answers(found):
            st.rerun()
        st.session_state["away"] = True

    look()


def _answers(found: Visitor) -> bool:
    try:
        found.client.own_key()
    except Unavailable:
        return False
    except AutoeffError:
        return True
    return True


def _markdown(error: AutoeffError) -> str:
    from autoeff.dashboard.words import markdown

    return markdown(sentence(error), 800)
