"""The form."""

from __future__ import annotations

from typing import Any


def test_the_form_says_the_command_and_the_file(view: Any) -> None:
    page = view("submit")
    assert not page.exception
    page.multiselect[1].set_value(["avg_bits<=3.5"]).run()
    assert [code.value for code in page.code] == ["autoeff search demo --limit 'avg_bits<=3.5'", "model: demo\nlimits:\n- avg_bits<=3.5"]
    submit = page.button(key="submit")
    assert submit.disabled


def test_what_the_server_refuses_is_a_sentence(view: Any, words: Any) -> None:
    page = view("submit")
    page.multiselect[1].set_value(["avg_bits<=0.01"]).run()
    page.button(key="check").click().run()
    assert not page.exception
    assert "least" in words(page)
    assert page.button(key="submit").disabled


def test_a_clone_fills_the_form(view: Any, shown: Any) -> None:
    page = view("submit")
    page.session_state["cloned"] = shown.job.spec
    page.run()
    assert page.multiselect[0].value == list(shown.job.spec["knobs"])
    assert page.multiselect[1].value == list(shown.job.spec["limits"])
    assert f"--trials {shown.job.budget}" in page.code[0].value


def test_a_key_that_reads_only_gets_no_form(view: Any, words: Any) -> None:
    page = view("submit", "reader")
    assert "may not start searches" in words(page)
    assert not page.button
    assert not page.selectbox
