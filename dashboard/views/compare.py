"""Searches beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.figures.fronts import draw_fronts
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import show
from autoeff.dashboard.words import NOTHING, age, figure, markdown, plain, sentence, short_model
from autoeff.errors import InputError

__all__ = ["draw"]

_OFFERED = 200
_MOST = 8


def draw(found: Visitor) -> None:
    """Fronts over each other, the best of each at common budgets, and what differs."""
    st.title("Compare")
    jobs = {job.job: job for job in found.client.job_page(limit=_OFFERED).items}
    st.session_state.setdefault("compared", [])
    st.session_state["compared_now"] = [name for name in st.session_state["compared"] if name in jobs]

    def keep() -> None:
        st.session_state["compared"] = st.session_state["compared_now"]

    chosen = st.multiselect(
        "Jobs", list(jobs), key="compared_now", format_func=lambda name: _words(jobs[name]), max_selections=_MOST, on_change=keep
    )
    if len(chosen) < 2:
        with st.container(border=True):
            st.write("Choose two jobs or more, here or in the list of jobs. They must have searched the same model on the same text.")
        return
    try:
        with st.spinner("Reading trials …", show_time=True):
            compared = _compared(found, [jobs[name] for name in chosen])
    except InputError as error:
        st.warning(markdown(sentence(error), 600), icon=":material/difference:")
        return
    names = [f"{run['job'][:6]} · {', '.join(run['limits']) or 'no limits'}" for run in compared.runs]
    with st.container(border=True):
        st.markdown(f"**Fronts**, limits left aside: {markdown(compared.quality)} over {markdown(compared.cost)}")
        fronts = {
            name: [(point["cost"], point["quality"], point["trial"]) for point in front]
            for name, front in zip(names, compared.fronts, strict=True)
        }
        drawn = draw_fronts(
            fronts, visit.colours(), quality=compared.quality, cost=compared.cost, method=compared.method, linear=compared.own,
            revision="-".join(chosen),
        )  # fmt: skip
        show(drawn, "fronts", f"Fronts of {len(names)} jobs")
    for notice in compared.notices:
        st.caption(markdown(sentence(notice), 400))
    budgets = _budgets(compared, names)
    if budgets:
        st.subheader(f"Best {markdown(compared.quality)} at common budgets")
        st.dataframe(budgets, hide_index=True, height="content")
    st.subheader("Settings that differ")
    _differing(compared.settings, names, "setting")
    st.subheader("Levels that differ in what was found")
    _differing(compared.decisions, names, "decision")


def _budgets(compared: Any, names: Sequence[str]) -> list[dict[str, str]]:
    winners = {run["run"]: run["job"][:6] for run in compared.runs}
    rows = []
    for budget in compared.budgets:
        best = [NOTHING if one is None else figure(compared.quality, one[compared.quality]) for one in budget["best"]]
        row = {"within": plain(budget["budget"], 80)}
        row[compared.cost] = figure(compared.cost, budget["bound"])
        row |= {plain(name, 60): text for name, text in zip(names, best, strict=True)}
        rows.append(row | {"best": winners.get(budget["winner"], "equal" if any(budget["best"]) else NOTHING)})
    return rows


def _differing(values: Mapping[str, Sequence[Any]], names: Sequence[str], what: str) -> None:
    if not values:
        st.write("None.")
        return
    rows = [
        {what: plain(key)} | {plain(name, 60): plain(_text(value), 80) for name, value in zip(names, found, strict=True)}
        for key, found in values.items()
    ]
    st.dataframe(rows, hide_index=True, height="content" if len(rows) < 12 else 420)


def _compared(found: Visitor, jobs: Sequence[Any]) -> Any:
    """Asked again only once something has happened to one of the jobs."""
    key = [(job.job, job.state, job.used) for job in jobs]
    kept: tuple[Any, Any] | None = st.session_state.get("comparison")
    if kept is None or kept[0] != key:
        kept = st.session_state["comparison"] = (key, found.client.compare([job.job for job in jobs]))
    return kept[1]


def _words(job: Any) -> str:
    limits = plain(", ".join(job.limits) or "no limits", 40)
    return f"{short_model(job.model)} · {limits} · {job.job[:6]} · {age(job.created, datetime.now(UTC))}"


def _text(value: object) -> str:
    return NOTHING if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
