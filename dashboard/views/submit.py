"""A new search: a form from the server's schema, the file and the command that do the same, and what the server says beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.form import Field, body_of, command_of, fields_of, parsed, values_of, written, yaml_of
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.words import duration, figure, file_bytes, markdown, plain, sentence
from autoeff.errors import AutoeffError, Conflict, InputError
from autoeff.spaces.knob import known_knobs

__all__ = ["draw"]

_ESSENTIAL = ("model", "knobs", "limits", "objectives", "budget.trials", "data.source", "data.windows")
_LIMITS = ("avg_bits<=3.5", "weight_bytes<=0.30x", "linear_bytes<=0.25x", "kv_bytes<=0.5x", "bytes_per_token<=0.5x", "decode_ms<=0.8x")
_OBJECTIVES = ("quality", "weight_bytes", "kv_bytes", "bytes_per_token", "flops_per_token", "decode_ms", "prefill_ms")
_GROUPS = {
    "": "Search",
    "data": "Search text",
    "eval_data": "Held-out text",
    "tune_data": "Text for adapters",
    "space": "Space",
    "budget": "Budget",
    "tasks": "Tasks",
}


def draw(found: Visitor) -> None:
    """The form."""
    st.title("Submit a search")
    if not found.may_write:
        st.info("This key may not start searches: it lacks the scope jobs:write.", icon=":material/lock:")
        return
    fields = fields_of(_contract(found))
    start = _start(fields)
    left, right = st.columns(2, gap="large")
    with left:
        values, fault = _filled(found, fields, start)
    body = body_of(fields, values)
    with right:
        _beside(found, body, fault)


def _start(fields: Sequence[Field]) -> Mapping[str, Any]:
    """What the form shows first: a job to clone, or the defaults."""
    if (cloned := st.session_state.pop("cloned", None)) is not None:
        st.session_state["form"] = st.session_state.get("form", 0) + 1
        st.session_state["start"] = values_of(fields, cloned)
        st.toast("The fields are those of the cloned job.", icon=":material/content_copy:")
    return st.session_state.get("start") or {"model": "demo"}


def _filled(found: Visitor, fields: Sequence[Field], start: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The values that stand in the form, and the first that cannot be read."""
    by_path = {field.path: field for field in fields}
    values: dict[str, Any] = {}
    fault: str | None = None

    def ask(field: Field) -> None:
        nonlocal fault
        try:
            values[field.path] = _asked(found, field, start.get(field.path, field.default))
        except InputError as error:
            fault = fault or sentence(error)
            st.caption(f":red[{markdown(sentence(error), 300)}]")

    for path in _ESSENTIAL:
        if path in by_path:
            ask(by_path[path])
    with st.expander("Everything else", icon=":material/tune:"):
        for group in dict.fromkeys(field.group for field in fields):
            rest = [field for field in fields if field.group == group and field.path not in _ESSENTIAL]
            if rest:
                st.markdown(f"**{_GROUPS.get(group, markdown(group))}**")
            for field in rest:
                ask(field)
    return values, fault


def _asked(found: Visitor, field: Field, value: Any) -> Any:
    key = f"field_{st.session_state.get('form', 0)}_{field.path}"
    label = f"{_GROUPS[field.group]}: {field.label}" if field.path in _ESSENTIAL and field.group else field.label.capitalize()
    common: dict[str, Any] = {"key": key, "help": field.help or None}
    if field.path == "model":
        return _named(label, [row.model for row in _models(found).items], value, **common)
    if field.path == "data.source":
        return _named(
            label, [row.source for row in _texts(found).items], value, placeholder="the model's own, or one of the server's", **common
        )
    if field.path == "knobs":
        names = list(value or {})
        chosen = st.multiselect(label, list(dict.fromkeys([*sorted(known_knobs()), *names])), names, accept_new_options=True, **common)
        return _with_settings(chosen, value or {}, key)
    if field.kind == "list":
        offered = {"limits": _LIMITS, "objectives": _OBJECTIVES}.get(field.path, ())
        chosen = st.multiselect(
            label,
            list(dict.fromkeys([*offered, *(value or ())])),
            list(value or ()),
            accept_new_options=True,
            placeholder="type and press Enter",
            **common,
        )
        return field.default if not chosen and field.nullable else chosen
    if field.kind == "flag":
        return st.checkbox(label, bool(value), **common)
    if field.kind == "choice":
        return st.selectbox(label, field.choices, index=field.choices.index(value) if value in field.choices else 0, **common)
    if field.kind in ("integer", "number"):
        whole = field.kind == "integer"
        kind = int if whole else float
        least = None if field.least is None else kind(field.least)
        most = None if field.most is None or field.most > 2**53 else kind(field.most)
        return st.number_input(
            label, least, most, None if value is None else kind(value), step=1 if whole else None, placeholder="default", **common
        )
    if field.kind == "text":
        return st.text_input(label, "" if value is None else str(value), placeholder="default" if field.nullable else None, **common) or (
            None if field.nullable else ""
        )
    return parsed(field, st.text_area(label, written(value), height=80, placeholder="YAML", **common))


def _with_settings(chosen: Sequence[str], value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Knobs with their settings, which stand in a field of their own."""
    known = {name: value.get(name) or {} for name in chosen}
    text = st.text_input(
        "Settings of the knobs",
        written({n: s for n, s in known.items() if s}),
        key=f"{key}_settings",
        placeholder="{bits: {group_size: 64}}",
        help="YAML: knob, then setting and value.",
    )
    given = parsed(Field("knobs", "yaml", {}, ""), text)
    if not isinstance(given, dict) or not all(isinstance(part, dict) for part in given.values()):
        raise InputError("settings of knobs are written so: {bits: {group_size: 64}}")
    return {name: given.get(name, {}) for name in chosen}


def _named(label: str, known: Sequence[str], value: Any, **options: Any) -> str | None:
    names = list(dict.fromkeys([*known, *([value] if value else [])]))
    picked = st.selectbox(label, names, index=names.index(value) if value else None, accept_new_options=True, **options)
    return None if picked is None else str(picked)


def _beside(found: Visitor, body: Mapping[str, Any], fault: str | None) -> None:
    """The same as a file and as a command; the check; the button."""
    with st.container(border=True):
        st.markdown("**The same from a shell**")
        st.code(command_of(body), language="sh", wrap_lines=True)
        text = yaml_of(body)
        st.code(text, language="yaml", wrap_lines=True)
        st.download_button(
            "job.yaml", text, "job.yaml", "application/yaml", icon=":material/download:", on_click="ignore", disabled=not text
        )
    checked: tuple[Any, Any] | None = st.session_state.get("checked")
    with st.container(horizontal=True):
        check = st.button("Check", icon=":material/fact_check:", key="check", disabled=fault is not None or not body.get("model"))
        good = checked is not None and checked[0] == body and fault is None
        submit = st.button(
            "Submit",
            type="primary",
            icon=":material/rocket_launch:",
            key="submit",
            disabled=not good,
            help=None if good else "Check it first: the server says what it will cost.",
        )
    if check:
        try:
            with st.spinner("The server looks at the model …", show_time=True):
                st.session_state["checked"] = (body, found.client.validate(body))
        except (InputError, Conflict) as error:
            st.session_state.pop("checked", None)
            st.error(markdown(sentence(error), 800), icon=":material/error:")
            return
        st.rerun()
    if submit:
        try:
            job = found.client.submit(body).job
        except AutoeffError as error:
            st.error(markdown(sentence(error), 800), icon=":material/error:")
            return
        st.session_state.pop("checked", None)
        visit.open_job(job)
    if good and checked is not None:
        _plan(checked[1], body)
    elif fault is None:
        st.caption("Check first: nothing is started, and the server says what is known of the job before any weight is loaded.")


def _plan(plan: Any, body: Mapping[str, Any]) -> None:
    """What the server knows before it starts."""
    asked = (body.get("budget") or {}).get("trials", 300)
    with st.container(border=True):
        st.success(
            f"It can be run: {len(plan.space['decisions'])} decisions, {asked} evaluations, about {duration(plan.seconds.get('search'))}.",
            icon=":material/check_circle:",
        )
        if asked < plan.minimum_trials:
            st.warning(f"At least {plan.minimum_trials} evaluations are needed.", icon=":material/warning:")
        for notice in plan.preflight.get("notices", ()):
            st.caption(markdown(sentence(notice), 400))
        st.caption(f"Memory: {file_bytes(plan.preflight.get('memory_bytes'))} of {file_bytes(plan.memory_cap_bytes)} allowed.")
        bounds = {limit["name"]: limit["bound"] for limit in plan.limits}
        rows = [
            {
                "cost": plain(name) + (f" ({method})" if (method := plan.methods.get(name, "exact")) != "exact" else ""),
                "dense": figure(name, value),
                "limit": figure(name, bounds.get(name)),
                "least": figure(name, plan.least.get(name)),
            }
            for name, value in sorted(plan.dense.items(), key=lambda item: item[0] not in bounds)
        ]
        st.dataframe(rows, hide_index=True, height="content", column_config={"limit": st.column_config.Column(width=80)})


def _contract(found: Visitor) -> Mapping[str, Any]:
    contract: Mapping[str, Any] = _kept("contract", found.client.contract)
    return contract


def _models(found: Visitor) -> Any:
    return _kept("models", found.client.models)


def _texts(found: Visitor) -> Any:
    return _kept("texts", found.client.datasets)


def _kept(name: str, ask: Any) -> Any:
    """Asked for once a session: a server's schema, models and texts change when it starts anew."""
    if name not in st.session_state:
        st.session_state[name] = ask()
    return st.session_state[name]
