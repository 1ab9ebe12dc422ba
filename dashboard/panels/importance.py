"""Which decisions matter, and how good configurations run through them: Optuna's charts over the job's trials."""

from __future__ import annotations

from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.fetch import Snapshot, Terrain, trial_rows
from autoeff.dashboard.figures.importance import draw_importance, draw_parallel, study_of
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import show
from autoeff.dashboard.words import markdown

__all__ = ["draw"]

_MOST = 1000
_LEAST = 8
_SHOWN = 10


def draw(found: Visitor, now: Snapshot, ground: Terrain | None) -> None:
    """Both charts, over the first thousand trials that were measured on the whole text."""
    kept: tuple[Any, Any] | None = st.session_state.get("study")
    key = (now.job.job, now.job.events)
    if kept is None or kept[0] != key:
        with st.spinner("Reading trials …"):
            rows = trial_rows(found.client, now.job.job, _MOST)
            tokens = None if now.own else max((m.tokens or 0 for row in rows if (m := row.measurements.get(now.job.quality))), default=0)
            kept = (key, study_of(rows, now.job.quality, tokens, None if ground is None else ground.space))
        st.session_state["study"] = kept
    study = kept[1]
    if study is None or len(study.trials) < _LEAST:
        st.write(f"At least {_LEAST} trials are needed to say which decisions matter; they appear while the search goes on.")
        return
    palette = visit.colours()
    ranked, drawn = draw_importance(study, palette, shown=_SHOWN, revision=now.job.job)
    st.caption(
        f"From {len(study.trials)} trials: how much of {markdown(now.job.quality)} each decision explains (PED-ANOVA), "
        "and the paths of configurations through those that explain the most. Names: block, place, knob."
    )
    show(drawn, "importance", "Importance of decisions")
    paths = draw_parallel(study, ranked, palette, quality=now.job.quality, logarithm=not now.own, revision=now.job.job)
    show(paths, "parallel", "Parallel coordinates")
