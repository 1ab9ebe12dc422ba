"""Another budget, answered from what a search has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.allowance import Slider, limits_of, sliders_of
from autoeff.dashboard.choosing import chosen_job
from autoeff.dashboard.fetch import Snapshot
from autoeff.dashboard.figures.front import Guest, draw_front
from autoeff.dashboard.figures.maps import draw_levels
from autoeff.dashboard.layers import grids_of
from autoeff.dashboard.outline import dots_of, front_of, guests_of
from autoeff.dashboard.theme import ROLES
from autoeff.dashboard.visit import Visitor, open_trial
from autoeff.dashboard.watching import ground_of, show, watched
from autoeff.dashboard.words import NOTHING, figure, markdown, plain, sentence, titled
from autoeff.errors import InputError, UnreachableLimit

__all__ = ["draw"]

_FIRST = 3
"""Sliders that are shown at once; the others are one click away."""


def draw(found: Visitor) -> None:
    """Sliders, and the configuration that they ask for."""
    job_id = chosen_job(found)
    if job_id is None:
        return
    now = watched(found, job_id)
    st.title("Budget")
    ground = ground_of(found, now.job)
    if ground is None:
        st.info("This search is of own code, whose costs are not known ahead; a budget cannot be answered for it.", icon=":material/info:")
        return
    st.caption("What is the best configuration for another budget? The answer comes from what the search has measured; no model is loaded.")
    sliders = sliders_of(ground, now.job.limits, now.job.quality)
    values = _sliders(job_id, sliders)
    limits = limits_of(sliders, values)
    if not limits:
        st.info(
            "Every slider stands at dense: nothing is limited, and the dense model is the answer. Move one to the left.",
            icon=":material/tune:",
        )
        return
    try:
        with st.spinner("Solving …", show_time=True):
            answer = _resolved(found, now, limits)
    except UnreachableLimit as error:
        st.warning(markdown(sentence(error), 600), icon=":material/block:")
        return
    except InputError as error:
        st.info(markdown(sentence(error), 600), icon=":material/info:")
        return
    chosen = answer.predicted if answer.answer == "predicted" or answer.measured is None else answer.measured
    _figures(now, answer)
    _way_out(now, answer, chosen, limits)
    _picture(now, answer, limits, sliders, values)
    with st.container(border=True):
        st.subheader("Its configuration")
        levels = draw_levels(grids_of(ground, chosen["configuration"]), visit.colours(), revision="answer")
        show(levels, "answer_levels", "Levels of the answer by block and place")


def _sliders(job_id: str, sliders: Sequence[Slider]) -> dict[str, float]:
    values = {}
    for place, slider in zip(st.columns(_FIRST, gap="large"), sliders, strict=False):
        with place:
            values[slider.name] = _slide(job_id, slider)
    if len(sliders) > _FIRST:
        with st.expander("Other costs"):
            for slider in sliders[_FIRST:]:
                values[slider.name] = _slide(job_id, slider)
    return values


def _slide(job_id: str, slider: Slider) -> float:
    return float(
        st.slider(
            f"{markdown(slider.name)}, {slider.unit}", slider.least, slider.most, slider.start, slider.step, format=f"%.{slider.digits}f",
            key=f"budget_{job_id}_{slider.name}", help="At its right end it limits nothing: that is the dense model.",
        )
    )  # fmt: skip


def _resolved(found: Visitor, now: Snapshot, limits: Sequence[str]) -> Any:
    """Asked once for the same limits while nothing has happened to the job."""
    kept: dict[Any, Any] = st.session_state.setdefault("resolved", {})
    key = (now.job.job, now.job.events, tuple(limits))
    if key not in kept:
        if len(kept) > 50:
            kept.clear()
        kept[key] = found.client.resolve(now.job.job, limits)
    return kept[key]


def _figures(now: Snapshot, answer: Any) -> None:
    """What the answer is expected to lose, what was measured, and which of both it is."""
    quality = now.job.quality
    expected = answer.predicted["measurements"][quality]
    measured = None if answer.measured is None else answer.measured["measurements"][quality]["value"]
    left, right = st.columns(2)
    left.metric(f"expected {markdown(titled(quality))}", f"{figure(quality, expected['value'])} ± {expected.get('spread') or 0.0:.2g}")
    right.metric(f"best measured {markdown(titled(quality))}", figure(quality, measured))
    st.caption(f"The answer is {markdown(answer.reason, 400)}.")


def _picture(now: Snapshot, answer: Any, limits: Sequence[str], sliders: Sequence[Slider], values: Mapping[str, float]) -> None:
    """Where the answer stands, and what it costs."""
    quality, cost = now.job.quality, now.job.judged_cost
    guests = [guest for guest in guests_of(now) if guest.role in ("dense", "uniform")]
    same = answer.measured is not None and answer.predicted.get("trial") == answer.measured["trial"]
    for role, row in (("expected", None if same else answer.predicted), ("measured", answer.measured)):
        if row is not None and cost in row["measurements"]:
            guests.append(
                Guest(
                    role,
                    "expected" if role == "expected" else f"trial {row['trial']}",
                    row.get("trial", -1),
                    row["measurements"][cost]["value"],
                    row["measurements"][quality]["value"],
                )
            )
    limit = next((values[s.name] * s.factor for s in sliders if s.name == cost and values[s.name] < s.most), None)
    front = draw_front(
        dots_of(now), front_of(now), guests, visit.colours(),
        quality=quality, cost=cost, limit=limit, method=now.method, revision=now.job.job, height=400,
    )  # fmt: skip
    with st.container(border=True):
        show(front, "budget_front", "The front with the answer in it")
    names = list(dict.fromkeys([quality, f"{quality}_held_out", *(text.partition("<=")[0] for text in limits), cost, "weight_bytes"]))
    rows = []
    for role, row in ((ROLES["expected"], None if same else answer.predicted), (ROLES["measured"], answer.measured)):
        if row is not None:
            found = row["measurements"]
            rows.append(
                {"": role + (f", trial {row['trial']}" if "trial" in row else "")}
                | {plain(n.replace("_held_out", " held out")): figure(n, found[n]["value"]) if n in found else NOTHING for n in names}
            )
    st.dataframe(rows, hide_index=True, height="content")


def _way_out(now: Snapshot, answer: Any, chosen: Mapping[str, Any], limits: Sequence[str]) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if "trial" in chosen:
            if st.button(f"Open trial {chosen['trial']}", type="primary", icon=":material/grid_on:", key="open_answer"):
                open_trial(now.job.job, chosen["trial"])
        elif answer.measured is not None and st.button(
            f"Open the measured one, trial {answer.measured['trial']}", icon=":material/grid_on:", key="open_measured"
        ):
            open_trial(now.job.job, answer.measured["trial"])
        st.download_button(
            "Configuration as JSON", json.dumps(dict(chosen["configuration"]), indent=1), f"{now.job.job}-answer.json", "application/json",
            icon=":material/download:", key="answer_json", on_click="ignore",
        )  # fmt: skip
    if "trial" not in chosen:
        st.caption("Nobody has measured this configuration yet. Where the run directory is, this measures it and keeps it as a trial:")
        command = " ".join(["autoeff resolve", now.job.job, *(f"--limit '{text}'" for text in limits), "--measure"])
        st.code(command, language="sh", wrap_lines=True)
