"""Has one part of a page drawn again when there is news for it, and only then.

A fragment that runs every few seconds draws all that it shows each time. So a small one looks, and tells this component what it saw; where
that has changed, the browser asks for the part of the page that shows it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

__all__ = ["tell"]

_SCRIPT = """
const seen = {};
export default function ({ data, setTriggerValue }) {
  const known = seen[data.part];
  seen[data.part] = data.mark;
  if (known !== undefined && known !== data.mark) setTriggerValue("news", data.mark);
}
"""


def tell(part: str, mark: str) -> None:
    """Draws the fragment of the key `part` again where `mark` is not what the browser heard before."""
    _mount()(key=f"{part}_news", data={"part": part, "mark": mark}, height=1, on_news_change=lambda: st.rerun(part))


@cache
def _mount() -> Any:
    return component("autoeff_news", js=_SCRIPT, isolate_styles=False)
