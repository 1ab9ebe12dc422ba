"""Searches beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.comparison import best_within, budgets_of, front_of, names_of, settings_of, why_not
from autoeff.dashboard.fetch import Snapshot, snapshot
from autoeff.dashboard.figures.fronts import draw_fronts
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import CHART
from autoeff.dashboard.words import NOTHING, age, figure, markdown, plain, short_model

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
    shown = [_known(found, name) for name in chosen]
    reason = why_not(shown)
    if reason is not None:
        st.warning(markdown(reason, 600), icon=":material/difference:")
        return
    shown = _on_one_cost(found, shown)
    names, first = names_of(shown), shown[0]
    fronts = {names[s.job.job]: front_of(s) for s in shown}
    with st.container(border=True):
        st.markdown(f"**Fronts**, limits left aside: {markdown(first.job.quality)} over {markdown(first.points.x)}")
        drawn = draw_fronts(
            fronts,
            visit.colours(),
            quality=first.job.quality,
            cost=first.points.x,
            method=first.method,
            linear=first.own,
            revision="-".join(chosen),
        )
        st.plotly_chart(drawn, theme=None, key="fronts", config=CHART, alt=f"Fronts of {len(shown)} jobs")
    _budgets(shown, fronts)
    _settings(shown, names)


def _budgets(shown: Sequence[Snapshot], fronts: Any) -> None:
    quality, cost = shown[0].job.quality, shown[0].points.x
    rows = []
    for label, bound in budgets_of(shown):
        best = {name: best_within(front, bound) for name, front in fronts.items()}
        values = [one[1] for one in best.values() if one is not None]
        winners = [name for name, one in best.items() if one is not None and one[1] == min(values)]
        row = {"within": plain(f"{cost} of {label}"), cost: figure(cost, bound)}
        row |= {plain(name, 60): NOTHING if one is None else figure(quality, one[1]) for name, one in best.items()}
        rows.append(row | {"best": plain(winners[0], 60) if len(winners) == 1 else "equal" if winners else NOTHING})
    if rows:
        st.subheader(f"Best {markdown(quality)} at common budgets")
        st.dataframe(rows, hide_index=True, height="content")


def _settings(shown: Sequence[Snapshot], names: Any) -> None:
    st.subheader("Settings that differ")
    differing = settings_of(shown)
    if not differing:
        st.write("None.")
        return
    rows = [
        {"setting": name} | {plain(names[s.job.job], 60): plain(_text(v), 80) for s, v in zip(shown, values, strict=True)}
        for name, values in differing.items()
    ]
    st.dataframe(rows, hide_index=True, height="content")


def _known(found: Visitor, name: str) -> Snapshot:
    kept: dict[str, Snapshot] = st.session_state.setdefault("snapshots", {})
    kept[name] = snapshot(found.client, name, kept.get(name))
    return kept[name]


def _on_one_cost(found: Visitor, shown: Sequence[Snapshot]) -> list[Snapshot]:
    """All over the cost at which the first is judged."""
    cost = shown[0].points.x
    return [s if s.points.x == cost else replace(s, points=found.client.points(s.job.job, x=cost)) for s in shown]


def _words(job: Any) -> str:
    limits = plain(", ".join(job.limits) or "no limits", 40)
    return f"{short_model(job.model)} · {limits} · {job.job[:6]} · {age(job.created, datetime.now(UTC))}"


def _text(value: object) -> str:
    return NOTHING if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
