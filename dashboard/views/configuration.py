"""One configuration, layer by layer, beside another: what differs, what it saves and loses, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.choosing import chosen_job
from autoeff.dashboard.exporting import export
from autoeff.dashboard.fetch import Snapshot, Terrain
from autoeff.dashboard.figures.blocks import draw_blocks
from autoeff.dashboard.figures.latency import Timed, draw_latency
from autoeff.dashboard.figures.maps import draw_levels
from autoeff.dashboard.layers import changes, grids_of, saved_by_block, shares_of
from autoeff.dashboard.outline import guests_of
from autoeff.dashboard.tables import column
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import CHART, ground_of, trial_of, watched
from autoeff.dashboard.words import NOTHING, figure, markdown, plain

__all__ = ["draw", "timed_of"]


def draw(found: Visitor) -> None:
    """The page of a trial of the chosen job."""
    job_id = chosen_job(found)
    if job_id is None:
        return
    now = watched(found, job_id)
    st.title("Configuration")
    number = _chosen_trial(now)
    if number is None:
        with st.container(border=True):
            st.write("Nothing is measured yet. Once the first trial has ended, its configuration can be seen here.")
        return
    trial = trial_of(found, now.job, number)
    ground = ground_of(found, now.job)
    beside = _beside(now, number, trial)
    other = None if beside is None else trial_of(found, now.job, beside)
    _measured(now, trial, other)
    if ground is None:
        st.dataframe([{"choice": plain(k), "value": plain(v)} for k, v in trial.configuration.items()], hide_index=True)
    else:
        _maps(ground, trial, other)
        _layers(now, ground, trial)
        _earned(now, number)
    _latency(now)
    if trial.state == "succeeded":
        with st.container(border=True):
            st.subheader("Export")
            export(found, now.job, number)


def _chosen_trial(now: Snapshot) -> int | None:
    """The trial in the address, else the best, else the first of the front; others are in the list or named by number."""
    rows = {
        row.trial: row
        for row in sorted([*now.front.items, *([] if now.best is None else [now.best])], key=lambda row: _value(row, now.job.judged_cost))
    }
    given = st.query_params.get("trial", "")
    wanted = int(given) if given.isdecimal() and int(given) < now.job.trials else now.front.best
    if wanted is None:
        wanted = next(iter(rows), None) if rows else (now.whole[0].trial if now.whole else None)
    if wanted is None:
        return None
    names = list(rows) if wanted in rows else [wanted, *rows]
    st.session_state["trial_picked"] = st.session_state["trial_number"] = wanted

    def pick(key: str) -> None:
        st.query_params["trial"] = str(st.session_state[key])

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Configuration", names, key="trial_picked", format_func=lambda n: _words(now, n, rows.get(n)), on_change=pick,
            args=("trial_picked",), width=420,
        )  # fmt: skip
        st.number_input("or trial", 0, max(0, now.job.trials - 1), key="trial_number", on_change=pick, args=("trial_number",), width=150)
    return wanted


def _words(now: Snapshot, number: int, row: Any) -> str:
    quality, cost = now.job.quality, now.job.judged_cost
    if row is None:
        return f"trial {number}"
    values = f"{quality} {figure(quality, _value(row, quality))} · {cost} {figure(cost, _value(row, cost))}"
    return plain(f"trial {number} · {values}" + (" · best" if number == now.front.best else ""), 120)


def _beside(now: Snapshot, number: int, trial: Any) -> int | None:
    """What to compare with: the best uniform level that costs no more, unless the reader wants another."""
    cost = _value(trial, now.job.judged_cost)
    guests = {guest.trial: guest for guest in guests_of(now) if guest.trial != number}
    uniform = [guest for guest in guests.values() if guest.role == "uniform"]
    nearest = min((g for g in uniform if g.cost <= cost), key=lambda g: g.quality, default=min(uniform, key=lambda g: g.cost, default=None))
    options: list[int | None] = [None, *guests, *(row.trial for row in now.front.items if row.trial != number and row.trial not in guests)]

    def words(option: int | None) -> str:
        if option is None:
            return "nothing"
        guest = guests.get(option)
        return f"trial {option}" if guest is None else plain(f"{guest.label} · trial {option}", 80)

    index = options.index(nearest.trial) if nearest is not None else 0
    return st.selectbox("Beside", options, index=index, format_func=words, key=f"beside_{now.job.job}_{number}", width=420)


def _measured(now: Snapshot, trial: Any, other: Any) -> None:
    names = list({**(other.measurements if other else {}), **trial.measurements})
    names.sort(key=lambda name: (name != now.job.quality, name != now.job.judged_cost))
    rows = []
    for name in names:
        one, two = trial.measurements.get(name), None if other is None else other.measurements.get(name)
        row = {"measurement": plain(name), f"trial {trial.trial}": NOTHING if one is None else figure(name, one.value)}
        if other is not None:
            row[f"beside: trial {other.trial}"] = NOTHING if two is None else figure(name, two.value)
            change = None if one is None or two is None or not two.value else one.value / two.value - 1
            row["difference"] = NOTHING if change is None else f"{change:+.1%}"
        row["text"] = NOTHING if one is None or one.split is None else one.split.replace("_", "-")
        row["how"] = NOTHING if one is None or one.method is None else one.method
        rows.append(row)
    if trial.failure is not None:
        st.error(markdown(f"{trial.failure.kind}: {trial.failure.message}", 800), icon=":material/error:")
    st.dataframe(rows, hide_index=True, height="content")


def _maps(ground: Terrain, trial: Any, other: Any) -> None:
    palette = visit.colours()
    columns = st.columns(2) if other is not None else [st.container()]
    for place, one in zip(columns, [trial] if other is None else [trial, other], strict=True):
        with place, st.container(border=True):
            st.markdown(f"**Trial {one.trial}**" + (f", {markdown(one.label)}" if one.label else f", {markdown(one.origin)}"))
            levels = draw_levels(grids_of(ground, one.configuration), palette, revision=str(one.trial))
            st.plotly_chart(
                levels,
                theme=None,
                key=f"levels_{'one' if one is trial else 'other'}",
                config=CHART,
                alt=f"Levels of trial {one.trial} by block and place",
            )
    if other is None:
        return
    differ = changes(ground, trial.configuration, other.configuration)
    with st.expander(f"What changed: {len(differ)} of {len(ground.space.decisions)} decisions", icon=":material/difference:"):
        st.dataframe(
            [
                {"decision": plain(d.key), "block": d.block, f"trial {other.trial}": str(b), f"trial {trial.trial}": str(a)}
                for d, a, b in differ
            ],
            hide_index=True,
        )


def _layers(now: Snapshot, ground: Terrain, trial: Any) -> None:
    damage: Mapping[str, Mapping[str, float | None]] = ((now.result or {}).get("table") or {}).get("damage", {})
    shares = shares_of(ground, trial.configuration, damage)
    with st.container(border=True):
        st.subheader("What each layer saves")
        if not shares:
            st.write("Every decision is dense: nothing is saved.")
            return
        names = [name for name in shares[0].saved if any(share.saved[name] for share in shares)]
        cost = st.segmented_control("Cost", names, default=names[0], key="saved_cost", label_visibility="collapsed", required=True)
        method = ground.costs.measures[cost].method
        blocks = draw_blocks(
            saved_by_block(shares, cost), visit.colours(), cost=cost, method=None if method == "exact" else method, revision=cost
        )
        st.plotly_chart(blocks, theme=None, key="blocks", config=CHART, alt=f"What each block saves of {cost}")
        rows = [
            {"decision": plain(s.decision), "block": s.block, "knob": plain(s.knob), "level": str(s.level)}
            | {f"{name} saved": s.saved[name] for name in names}
            | {f"{now.job.quality} alone": s.alone}
            for s in shares
        ]
        st.dataframe(
            rows,
            hide_index=True,
            height=320 if len(rows) > 8 else "content",
            column_config={f"{name} saved": column(name) for name in names},
        )
        st.caption(
            "Saved against the dense level at this place, everything else as it is. Alone: the loss with this level and nothing else."
        )


def _earned(now: Snapshot, number: int) -> None:
    """What each knob of the found configuration is worth: against the best configuration without it that was confirmed."""
    earned = (now.result or {}).get("attribution")
    if not earned or earned["trial"] != number:
        return
    quality = now.job.quality
    with st.container(border=True):
        st.subheader("What each knob earned")
        rows = [
            {"without": plain(row["knob"], 60), "instead": plain(row["level"], 60), "trial": row["trial"]}
            | {f"{quality} held out": figure(quality, row["held_out"]), "earned": figure(quality, row["earned"])}
            for row in earned["rows"]
        ]
        st.dataframe(rows, hide_index=True)
        st.caption(
            "The best confirmed configuration within the limits where the knob is one level everywhere; earned is what it loses more."
        )


def _latency(now: Snapshot) -> None:
    latency = (now.result or {}).get("latency") or {}
    with st.container(border=True):
        st.subheader("Predicted and measured time")
        timed = timed_of(latency)
        if not timed:
            estimated = latency.get("method") == "estimated"
            st.caption(
                "These times are estimated for a device that is not here, and nothing was measured on it."
                if estimated
                else "A search with a limit or an objective on decode_ms or prefill_ms times its finalists end to end when it ends."
            )
            return
        st.plotly_chart(
            draw_latency(timed, visit.colours(), revision=now.job.job),
            theme=None,
            key="latency",
            config=CHART,
            alt="Predicted over measured time",
        )
        st.caption(
            markdown(
                f"{latency['device']}, batch {latency['batch']}, context {latency['context']}. Bars: half the distance of the quartiles.",
                300,
            )
        )


def timed_of(latency: Mapping[str, Any]) -> list[Timed]:
    """The models that were timed end to end, of a result's latency table."""
    return [
        Timed(
            row["role"],
            str(row["point"] or row["role"]),
            name,
            time["predicted"]["value"],
            time["measured"]["value"],
            time["measured"]["spread"],
        )
        for row in latency.get("rows", ())
        for name, time in row["times"].items()
        if time.get("measured")
    ]


def _value(row: Any, name: str) -> float:
    measured = row.measurements.get(name)
    return float("inf") if measured is None else float(measured.value)
