"""The entry: asks for a key, and leads to the views. `autoeff dashboard` has Streamlit run this file."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.live_theme import follow_theme
from autoeff.dashboard.views import budget, compare, configuration, hardware, job, jobs, keys, login, submit
from autoeff.dashboard.words import markdown, plain

__all__ = ["main"]

_VIEWS = {
    "Searches": {
        "jobs": (jobs.draw, "Jobs", ":material/list:"),
        "submit": (submit.draw, "Submit", ":material/add_circle:"),
        "compare": (compare.draw, "Compare", ":material/stacked_line_chart:"),
    },
    "One search": {
        "job": (job.draw, "Job", ":material/monitoring:"),
        "configuration": (configuration.draw, "Configuration", ":material/grid_on:"),
        "budget": (budget.draw, "Budget", ":material/tune:"),
    },
    "Plant": {
        "hardware": (hardware.draw, "Hardware", ":material/memory:"),
        "keys": (keys.draw, "Keys", ":material/key:"),
    },
}

# A front. Icons by name would be fetched from elsewhere.
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#1d63d8"/>'
    '<path d="M7 8v10h6v5h12" fill="none" stroke="#fff" stroke-width="3.5" stroke-linecap="round" stroke-linejoin="round"/></svg>'
)


def main() -> None:
    """Draws the page that was asked for; without a key, the one that asks for it."""
    st.set_page_config(page_title="autoeff", page_icon=_ICON, layout="wide", initial_sidebar_state="auto")
    found = visit.visitor()
    sections: dict[str, list[st.Page]] = {}
    pages = {}
    for section, views in _VIEWS.items():
        for name, (draw, title, icon) in views.items():
            shown = found is not None and (found.is_admin or name != "keys") and (found.may_write or name != "submit")
            pages[name] = st.Page(
                login.draw if found is None else _view(draw, found),
                title=title, icon=icon, url_path=name, default=name == "jobs", visibility="visible" if shown else "hidden",
            )  # fmt: skip
            sections.setdefault(section, []).append(pages[name])
    st.session_state["pages"] = pages
    # An address that somebody was given leads where it says once there is a key, so it is known before there is one.
    page = st.navigation(sections, position="hidden" if found is None else "sidebar")
    page.run()
    if found is not None:
        _foot(found)
        follow_theme(visit.colours().name)


def _foot(found: visit.Visitor) -> None:
    with st.sidebar:
        st.caption(
            markdown(
                f"{found.client.server.partition('://')[2]} · {found.key.owner} · {plain(found.key.name, 40)}"
                + ("" if found.may_write else " · reads only"),
                200,
            )
        )
        st.button("Log out", icon=":material/logout:", type="tertiary", on_click=visit.log_out)


def _view(draw: Callable[[visit.Visitor], None], found: visit.Visitor) -> Callable[[], None]:
    """A page whose faults are sentences."""

    def page() -> None:
        with visit.guarded(found):
            draw(found)

    return page


if __name__ == "__main__":
    main()
