"""Optuna's charts of a job, in the colours of the dashboard."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import log10
from typing import Any

import optuna
import plotly.graph_objects as go

from autoeff.dashboard.figures.canvas import canvas
from autoeff.dashboard.layers import place_name
from autoeff.dashboard.theme import Palette, mixed
from autoeff.dashboard.words import chart
from autoeff.spaces.space import SearchSpace

__all__ = ["draw_importance", "draw_parallel", "study_of"]

_LINES = 150
"""Paths that can still be told apart."""


def study_of(rows: Sequence[Any], quality: str, tokens: int | None, space: SearchSpace | None) -> optuna.Study | None:
    """A study in memory of the trials measured on the whole search text; None where there are none.

    Losses are positive and spread over decades, so their logarithms stand in it; what lost nothing is left out. Values that may be
    negative stand as they are.

    Args:
        rows: Trials with their configurations.
        quality: Name of the measurement that is minimised.
        tokens: Of the whole search text; None where values are not taken on text.
        space: The decisions; None where the user's own code is searched.
    """
    kept = []
    for row in rows:
        measured = row.measurements.get(quality)
        if measured is None or (tokens is not None and measured.tokens != tokens):
            continue
        if tokens is None or measured.value > 0:
            kept.append((row.configuration, measured.value if tokens is None else log10(measured.value)))
    if not kept:
        return None
    if space is not None:
        levels: dict[str, tuple[Any, ...]] = {decision.key: decision.levels for decision in space.decisions}
    else:
        names = dict.fromkeys(name for configuration, _ in kept for name in configuration)
        levels = {name: tuple(dict.fromkeys(c[name] for c, _ in kept if name in c)) for name in names}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(choices) for name, choices in levels.items()
    }
    study = optuna.create_study(direction="minimize", storage=optuna.storages.InMemoryStorage())
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: configuration.get(name, choices[0]) for name, choices in levels.items()},
                distributions=distributions,
                value=value,
            )
            for configuration, value in kept
        ]
    )
    return study


def draw_importance(study: optuna.Study, palette: Palette, *, shown: int, revision: str = "") -> tuple[list[str], go.Figure]:
    """The names of the decisions that explain the most, and bars for them in the colours of their knobs.

    Returns:
        At most `shown` names, the most important first, and the chart.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its evaluators are marked as experimental
        found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
        ranked = list(found)[:shown]
        drawn = optuna.visualization.plot_param_importances(study, evaluator=_Known(found), params=ranked)
    drawn.update_layout(canvas(palette, 120 + 26 * len(ranked), revision).layout.to_plotly_json(), title_text="", showlegend=False)
    drawn.update_traces(marker_color=[palette.knob(_knob(str(name))) for name in drawn.data[0].y], textfont={"color": palette.muted})
    drawn.update_xaxes(title_text="share of what is explained", title_font={"size": 13})
    drawn.update_yaxes(title_text="", tickvals=list(drawn.data[0].y), ticktext=[_words(str(name)) for name in drawn.data[0].y])
    return ranked, drawn


def draw_parallel(
    study: optuna.Study, names: Sequence[str], palette: Palette, *, quality: str, logarithm: bool, revision: str = ""
) -> go.Figure:
    """The paths of the best configurations through these decisions, the better the stronger the colour.

    Args:
        study: As of `study_of`.
        names: Of decisions.
        palette: Of the page.
        quality: Name of what is minimised.
        logarithm: Whether the study holds logarithms of it.
        revision: As of `canvas`.
    """
    best = optuna.create_study(direction="minimize", storage=optuna.storages.InMemoryStorage())
    best.add_trials(sorted(study.trials, key=lambda trial: trial.values[0])[:_LINES])
    values = [trial.values[0] for trial in best.trials]
    low, high = min(values), max(values)
    drawn = optuna.visualization.plot_parallel_coordinate(best, params=list(names), target_name=quality)
    axis = {name: drawn.layout.xaxis[name] for name in ("tickvals", "range")}
    labels = [chart(quality, 40), *map(_words, sorted(names))]  # Optuna's own are cut
    for one in drawn.layout.annotations if logarithm else ():
        if one.x == axis["tickvals"][0]:
            one.text = f"{10 ** float(one.text):.2g}"
    drawn.update_layout(canvas(palette, 460, revision).layout.to_plotly_json(), title_text="", showlegend=False)
    drawn.update_layout(margin={"l": 70, "r": 40, "t": 28, "b": 110})
    drawn.update_xaxes(**axis, ticktext=labels, tickangle=-40, automargin=False, tickfont={"size": 11, "color": palette.muted})
    drawn.update_yaxes(visible=False, range=(-0.08, 1.08))
    drawn.update_annotations(font={"size": 10, "color": palette.muted})
    drawn.update_shapes(line={"color": palette.line, "width": 1})
    for trace in drawn.data:
        if trace.mode == "lines":
            share = (float(trace.customdata[0][1]) - low) / (high - low or 1.0)
            trace.line.color = mixed(palette.found, palette.muted, share)
            trace.opacity = 0.75 - 0.5 * share
        else:
            trace.marker.showscale = False  # the first axis says it
    return drawn


class _Known(optuna.importance.BaseImportanceEvaluator):
    """Importances that were computed before: Optuna's chart would compute them again."""

    def __init__(self, found: dict[str, float]) -> None:
        self._found = found

    def evaluate(self, study: optuna.Study, params: list[str] | None = None, *, target: Any = None) -> dict[str, float]:
        return {name: self._found[name] for name in params or self._found}


def _knob(name: str) -> str:
    return name.rpartition(":")[2] if ":" in name else ""


def _words(name: str) -> str:
    """A decision for people: its block, the end of its place, its knob."""
    site, _, knob = name.rpartition(":")
    block = next((part for part in site.split(".") if part.isdecimal()), "")
    return chart(" ".join(part for part in (block, place_name(site), knob) if part), 60)
