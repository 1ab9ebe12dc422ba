"""Keys, for admins."""

from __future__ import annotations

from typing import Any


def test_an_admin_makes_a_key_sees_it_once_and_revokes_it(view: Any, client: Any) -> None:
    page = view("keys")
    assert not page.exception
    page.text_input[0].set_value("<b>night</b>")
    page.button[-1].click().run()
    (made,) = [code.value for code in page.code]
    assert made.startswith("ae_")
    page.button(key="key_kept").click().run()
    assert not page.code
    frame = page.dataframe[0].value
    assert frame[frame["key"] == made[3:11]]["name"].iloc[0] == "<b>night</b>"
    client.revoke_key(made[3:11])
    page.run()
    frame = page.dataframe[0].value
    assert frame[frame["key"] == made[3:11]]["state"].iloc[0].startswith("revoked")


def test_who_is_no_admin_sees_no_key(view: Any, words: Any) -> None:
    page = view("keys", "reader")
    assert "may not see keys" in words(page)
    assert not page.dataframe
    assert not page.text_input
