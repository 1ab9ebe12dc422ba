"""What a page says when the server is away, the key is revoked, the job is gone; and that it recovers by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest

from autoeff.client import Client
from autoeff.dashboard import visit
from autoeff.dashboard.visit import Visitor


@pytest.fixture
def client_of() -> Iterator[Callable[[str, str], Client]]:
    """`client_of(url, key)`: a client that gives up at once, closed in the end."""
    with ExitStack() as stack:
        yield lambda url, key: stack.enter_context(Client(url, key, attempts=1))


def test_a_server_that_is_away_is_a_sentence_and_its_return_is_seen(
    view: Any, words: Any, plant: Any, servers: ModuleType, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = plant.visitor()
    nobody = client_of(f"http://127.0.0.1:{servers.free_port()}", plant.keys["all"])
    monkeypatch.setitem(plant.visitors, "gone", Visitor(nobody, known.key))
    page = view("job", "gone", job=plant.job)
    assert not page.exception
    assert "Cannot reach the server" in words(page)
    assert "asks again by itself" in words(page)
    page.session_state["visitor"] = known
    page.run()
    assert "Cannot reach" not in words(page)
    assert page.metric


def test_what_was_known_stays_while_the_server_is_away(view: Any, words: Any, plant: Any, servers: ModuleType, client_of: Any) -> None:
    page = view("job")
    known = page.session_state["visitor"]
    page.session_state["visitor"] = Visitor(client_of(f"http://127.0.0.1:{servers.free_port()}", plant.keys["all"]), known.key)
    page.session_state["job_tab"] = "Baselines"
    page.run()
    assert not page.exception
    assert "The server cannot be reached just now" in words(page)
    assert page.metric


def test_a_revoked_key_is_asked_for_anew(view: Any, plant: Any, client: Client, client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client.make_key("short", "local", ["jobs:read"])
    revoked = client_of(plant.url, made.text)
    monkeypatch.setitem(plant.visitors, "short", Visitor(revoked, revoked.own_key()))
    page = view("jobs", "short")
    assert page.dataframe
    client.revoke_key(made.key)
    page.run()
    assert "visitor" not in page.session_state
    assert "revoked" in page.session_state["told"]


def test_a_part_that_outlives_the_visit_asks_nothing(plant: Any) -> None:
    from streamlit.testing.v1 import AppTest

    script = """
import streamlit as st
from autoeff.dashboard import visit
if (found := st.session_state.pop("earlier", None)) is not None:
    with visit.guarded(found):
        st.text("drawn for who has left")
st.text("asks for a key")
"""
    page = AppTest.from_string(script)
    page.session_state["earlier"] = plant.visitor()
    page.run()
    assert [text.value for text in page.text] == ["asks for a key"]


def test_a_key_that_may_not_is_told_so_and_stays(
    view: Any, words: Any, plant: Any, client: Client, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client.make_key("writes", "local", ["jobs:write"])
    blind = client_of(plant.url, made.text)
    monkeypatch.setitem(plant.visitors, "blind", Visitor(blind, blind.own_key()))
    page = view("jobs", "blind")
    assert not page.exception
    assert "lacks the scope jobs:read" in words(page)
    assert page.session_state["visitor"].client is blind


WAYS = {"Open it", "First", "Back", "Next"}
"""Buttons that lead somewhere and change nothing."""


@pytest.mark.parametrize("name", ["jobs", "job", "configuration", "submit", "hardware", "keys"])
def test_a_key_that_reads_only_is_offered_nothing_that_writes(view: Any, name: str) -> None:
    page = view(name, "reader")
    assert not page.exception
    assert {button.label for button in page.button} <= WAYS


def test_the_link_of_the_command_lets_in_and_no_other_does(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("AUTOEFF_SERVER", plant.url)
    monkeypatch.setenv("AUTOEFF_KEY", plant.keys["reader"])
    monkeypatch.setenv("AUTOEFF_DASHBOARD_TOKEN", "right")
    script = "import streamlit as st\nfrom autoeff.dashboard import visit\nst.text(str(visit.visitor()))"
    for token, inside in (("wrong", False), ("", False), ("right", True)):
        page = AppTest.from_string(script)
        page.query_params["token"] = token
        assert ("Visitor" in page.run().text[0].value) == inside, token
        if inside:
            page.session_state["visitor"].client.close()


def test_a_wrong_key_is_refused_with_a_sentence(plant: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("AUTOEFF_SERVER", plant.url)
    page = AppTest.from_string("from autoeff.dashboard.views import login\nlogin.draw()").run()
    for text in ("ae_00000000_" + "a" * 43, "no key", "ключ"):
        page.text_input[0].set_value(text)
        page.button[0].click().run()
        assert not page.exception
        assert len(page.error) == 1, text
    assert visit.server() == plant.url
