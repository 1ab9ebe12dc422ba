"""Draws the page again when the reader's browser turns light or dark: colours inside charts are not those of a style sheet."""

from __future__ import annotations

from functools import cache
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

__all__ = ["follow_theme"]

_SCRIPT = """
let told;
export default function ({ data, setTriggerValue }) {
  const app = document.querySelector("[data-testid=stApp]");
  const look = () => {
    const [red, green, blue] = getComputedStyle(app).backgroundColor.match(/\\d+/g).map(Number);
    const kind = red + green + blue < 384 ? "dark" : "light";
    if (kind === data.drawn) told = undefined;
    else if (kind !== told) setTriggerValue("kind", told = kind);  // once: the server may see it otherwise
  };
  const watch = new MutationObserver(look);
  watch.observe(app, { attributes: true, attributeFilter: ["class"] });
  look();
  return () => watch.disconnect();
}
"""


def follow_theme(drawn: str) -> None:
    """To be called once on a page whose charts were drawn as `light` or `dark`."""
    with st.sidebar:
        _mount()(key="theme_watch", data={"drawn": drawn}, on_kind_change=_nothing)


@cache
def _mount() -> Any:
    return component("autoeff_theme", js=_SCRIPT, isolate_styles=False)


def _nothing() -> None:
    """That the page runs again is all that is wanted."""
