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
from autoeff.dashboard.layers import changes, grids_of, place_of, saved_by_block, shares_of
from autoeff.dashboard.outline import guests_of
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.watching import ground_of, show, trial_of, watched
from autoeff.dashboard.words import NOTHING, figure, markdown, plain, titled, unit_of

__all__ = ["draw", "timed_of"]

_FIGURES = 5
"""Measurements that stand above the maps; the others are one click away."""


def draw(found: Visitor) -> None:
    """The page of a trial of the chosen job."""
    job_id = chosen_job(found)
    if job_id is None:
        return
    now = watched(found, job_id)
    st.title("Configuration")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        number = _chosen_trial(now)
        trial = None if number is None else trial_of(found, now.job, number)
        beside = None if trial is None else _beside(now, trial)
    if trial is None:
        with st.container(border=True):
            st.write("Nothing is measured yet. Once the first trial has ended, its configuration can be seen here.")
        return
    ground = ground_of(found, now.job)
    other = None if beside is None else trial_of(found, now.job, beside)
    _figures(now, trial, other)
    if trial.failure is not None:
        st.error(markdown(f"{trial.failure.kind}: {trial.failure.message}", 800), icon=":material/error:")
    if ground is None:
        st.dataframe([{"choice": plain(k), "value": plain(v)} for k, v in trial.configuration.items()], hide_index=True, height="content")
    else:
        _maps(ground, trial, other)
    with st.expander("Every measurement", icon=":material/table_rows:"):
        st.dataframe(_measured(now, trial, other), hide_index=True, height="content")
    _earned(now, trial.trial)
    if trial.state == "succeeded":
        with st.container(border=True):
            st.subheader("Export")
            export(found, now.job, trial.trial)
    if ground is not None:
        _layers(now, ground, trial)
    _latency(now)


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

    st.selectbox(
        "Trial of the front", names, key="trial_picked", format_func=lambda n: _words(now, n, rows.get(n)), on_change=pick,
        args=("trial_picked",), width=400,
    )  # fmt: skip
    st.number_input("or any trial", 0, max(0, now.job.trials - 1), key="trial_number", on_change=pick, args=("trial_number",), width=130)
    return wanted


def _words(now: Snapshot, number: int, row: Any) -> str:
    quality, cost = now.job.quality, now.job.judged_cost
    if row is None:
        return f"trial {number}"
    values = f"{quality} {figure(quality, _value(row, quality))} · {cost} {figure(cost, _value(row, cost))}"
    return plain(f"trial {number} · {values}" + (" · best" if number == now.front.best else ""), 120)


def _beside(now: Snapshot, trial: Any) -> int | None:
    """What to compare with: the best uniform level that costs no more, unless the reader wants another."""
    number, cost = trial.trial, _value(trial, now.job.judged_cost)
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
    return st.selectbox("Beside", options, index=index, format_func=words, key=f"beside_{now.job.job}_{number}", width=230)


def _figures(now: Snapshot, trial: Any, other: Any) -> None:
    """What the trial loses and costs, and by how much that differs from what stands beside it."""
    quality = now.job.quality
    names = [name for name in dict.fromkeys([quality, f"{quality}_held_out", *now.job.columns]) if name in trial.measurements][:_FIGURES]
    if not names:
        return
    for place, name in zip(st.columns(len(names)), names, strict=True):
        change = _difference(trial, other, name)
        place.metric(
            markdown(titled(name)), figure(name, trial.measurements[name].value),
            change and f"{change} against trial {other.trial}", delta_color="inverse", delta_arrow="off",
        )  # fmt: skip


def _difference(trial: Any, other: Any, name: str) -> str | None:
    one, two = trial.measurements.get(name), None if other is None else other.measurements.get(name)
    if one is None or two is None or not two.value or abs(one.value / two.value - 1) < 0.0005:
        return None
    return f"{one.value / two.value - 1:+.1%}"


def _measured(now: Snapshot, trial: Any, other: Any) -> list[dict[str, str]]:
    names = list({**(other.measurements if other else {}), **trial.measurements})
    names.sort(key=lambda name: (name != now.job.quality, name != now.job.judged_cost))
    rows = []
    for name in names:
        one, two = trial.measurements.get(name), None if other is None else other.measurements.get(name)
        known = one or two
        row = {"measurement": plain(name), f"trial {trial.trial}": NOTHING if one is None else figure(name, one.value)}
        if other is not None:
            row[f"beside: trial {other.trial}"] = NOTHING if two is None else figure(name, two.value)
            row["difference"] = _difference(trial, other, name) or NOTHING
        row["text"] = NOTHING if known is None or known.split is None else known.split.replace("_", "-")
        row["how"] = NOTHING if known is None or known.method is None else known.method
        rows.append(row)
    return rows


def _maps(ground: Terrain, trial: Any, other: Any) -> None:
    palette = visit.colours()
    columns = st.columns(2) if other is not None else [st.container()]
    for place, one in zip(columns, [trial] if other is None else [trial, other], strict=True):
        with place, st.container(border=True):
            st.markdown(f"**Trial {one.trial}**" + (f", {markdown(one.label)}" if one.label else f", {markdown(one.origin)}"))
            levels = draw_levels(grids_of(ground, one.configuration), palette, revision=str(one.trial))
            show(levels, f"levels_{'one' if one is trial else 'other'}", f"Levels of trial {one.trial} by block and place")
    if other is None:
        return
    differ = changes(ground, trial.configuration, other.configuration)
    with st.expander(f"What changed: {len(differ)} of {len(ground.space.decisions)} decisions", icon=":material/difference:"):
        st.dataframe(
            [
                {"block": d.block, "place": plain(place_of(d)), "knob": plain(d.knob)}
                | {f"trial {other.trial}": str(b), f"trial {trial.trial}": str(a)}
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
        saved = {knob: blocks for knob, blocks in saved_by_block(shares, cost).items() if any(blocks.values())}
        blocks = sorted({decision.block for decision in ground.space.decisions})
        drawn = draw_blocks(saved, blocks, visit.colours(), cost=cost, method=None if method == "exact" else method, revision=cost)
        show(drawn, "blocks", f"What each block saves of {cost}")
        units = {name: unit_of(name, max(abs(share.saved[name]) for share in shares)) for name in names}
        titles = {name: f"{name}, {unit}" for name, (unit, _) in units.items()}
        rows = [
            {"block": s.block, "place": plain(s.place), "knob": plain(s.knob), "level": str(s.level)}
            | {titles[name]: s.saved[name] / factor for name, (_, factor) in units.items()}
            | {f"{now.job.quality} alone": s.alone}
            for s in shares
        ]
        st.dataframe(
            rows,
            hide_index=True,
            height=320 if len(rows) > 8 else "content",
            column_config={title: st.column_config.NumberColumn(format="%.4g") for title in titles.values()},  # numbers, so that they sort
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
            {"knob": plain(row["knob"], 60), "one level everywhere": plain(row["level"], 60), "trial": str(row["trial"])}
            | {f"{quality} held out then": figure(quality, row["held_out"]), "earned": f"{row['earned']:+.3g}"}
            for row in earned["rows"]
        ]
        st.dataframe(rows, hide_index=True, height="content")
        st.caption(
            "The best confirmed configuration within the limits in which the knob has one level everywhere, and how much more that loses "
            f"than trial {number}: what choosing the knob place by place earned. Below zero, the search would have done better without."
        )


def _latency(now: Snapshot) -> None:
    """Of finalists timed end to end, where the search was about time."""
    latency = (now.result or {}).get("latency") or {}
    timed = timed_of(latency)
    if not timed and latency.get("method") != "estimated":
        return
    with st.container(border=True):
        st.subheader("Predicted and measured time")
        if not timed:
            st.caption("These times are estimated for a device that is not here, and nothing was measured on it.")
            return
        show(draw_latency(timed, visit.colours(), revision=now.job.job), "latency", "Predicted over measured time")
        where = f"{latency['device']}, batch {latency['batch']}, context {latency['context']}"
        st.caption(markdown(f"{where}. Bars: half the distance of the quartiles.", 300))


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
