"""A Plotly chart that changes without being made anew, so that the reader's zoom and whatever a pointer rests on stay.

`st.plotly_chart` replaces its element when the figure changes; this one hands the figure to `Plotly.react`, which keeps what the reader
did while the figure's `uirevision` is the same. The script is the one that the package `plotly` brings, served by this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import plotly.graph_objects as go
import streamlit as st
from plotly.offline import get_plotlyjs
from streamlit.components.v2 import component
from streamlit.runtime import get_instance

__all__ = ["live_chart"]

# Everything that comes from elsewhere is inside the figure, whose texts Plotly draws; none of it becomes part of the page.
_SCRIPT = """
const loading = {};
function load(url) {
  if (window.Plotly) return Promise.resolve();
  loading[url] ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = url; script.onload = done; script.onerror = failed;
    document.head.appendChild(script);
  });
  return loading[url];
}
export default function ({ data, parentElement, setTriggerValue }) {
  let chart = parentElement.querySelector(".live-chart");
  if (!chart) {
    chart = document.createElement("div");
    chart.className = "live-chart js-plotly-plot";
    chart.setAttribute("role", "figure");
    parentElement.appendChild(chart);
  }
  const { figure, config, alt, plotly } = JSON.parse(new TextDecoder().decode(data));
  chart.setAttribute("aria-label", alt);
  chart.style.height = figure.layout.height + "px";
  load(plotly).then(() => Plotly.react(chart, figure.data, figure.layout, config)).then(() => {
    if (chart.watched) return;
    chart.watched = new ResizeObserver(() => chart.offsetParent && Plotly.Plots.resize(chart));  // what is hidden has no size
    chart.watched.observe(chart);
    chart.on("plotly_click", ({ points }) => {
      const trial = points[0]?.customdata?.[0];
      if (Number.isInteger(trial) && trial >= 0) setTriggerValue("trial", trial);
    });
  });
  return () => { chart.watched?.disconnect(); };
}
"""


def live_chart(draw: Callable[[], go.Figure], state: Hashable, key: str, config: dict[str, Any], alt: str) -> int | None:
    """Shows the chart; the number of the trial whose point was clicked just now, if one was.

    Args:
        draw: Makes the figure, with a height, and with the trial first in the `customdata` of its points. Called where `state` is new.
        state: Of what the figure shows.
        key: Names the chart on the page.
        config: Of Plotly.
        alt: What the chart shows, for those who do not see it.
    """
    script = get_instance().media_file_mgr.add(_plotly(), "text/javascript", "plotly")
    kept: tuple[Hashable, bytes] | None = st.session_state.get(f"{key}_drawn")
    if kept is None or kept[0] != state:
        rest = json.dumps({"config": {**config, "responsive": True}, "alt": alt, "plotly": script})
        kept = st.session_state[f"{key}_drawn"] = (state, f'{{"figure": {draw().to_json()}, {rest[1:]}'.encode())
    with st.container(key=key):
        drawn = _mount()(key=f"{key}_chart", data=kept[1], on_trial_change=_nothing)
    return None if drawn.trial is None else int(drawn.trial)


@cache
def _mount() -> Any:
    return component("autoeff_live_chart", js=_SCRIPT, isolate_styles=False)


@cache
def _plotly() -> bytes:
    return str(get_plotlyjs()).encode()


def _nothing() -> None:
    """A click is read from the component's value."""
