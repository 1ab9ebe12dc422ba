"""Writing a trial out: the request, the wait, the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from autoeff.dashboard import visit
from autoeff.dashboard.fetch import contents
from autoeff.dashboard.visit import Visitor
from autoeff.dashboard.words import figure, file_bytes, markdown, plain, sentence
from autoeff.errors import AutoeffError

__all__ = ["export", "files"]

_FORMATS = {
    "hf-dense": "a model in its original shapes, which transformers loads",
    "recipe": "the configuration alone, a small file",
}
_LOOK_S = 1.5
_SMALL_BYTES = 32 << 20
_MOST_BYTES = 512 << 20
"""What a page sends through itself; larger files are for the command."""


def export(found: Visitor, job: Any, number: int) -> None:
    """Asks for an export of a trial where the key may, and offers the files that were written."""
    if found.may_write:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            form = st.selectbox(
                "Format", list(_FORMATS), format_func=lambda name: f"{name}: {_FORMATS[name]}", key="export_format", width=420
            )
            if st.button("Export", type="primary", icon=":material/ios_share:", key="export"):
                try:
                    found.client.begin_export(job.job, number, form)
                except AutoeffError as error:
                    st.error(markdown(sentence(error), 600), icon=":material/error:")
    files(found, job, number)


def files(found: Visitor, job: Any, number: int | None = None) -> None:
    """The files of a job, or of one of its trials, as downloads; those that are being written appear when they are."""
    building = any(artifact.state == "building" for artifact in _artifacts(found, job, number))

    @st.fragment(run_every=_LOOK_S if building else None)
    def listed() -> None:
        with visit.guarded(found):
            artifacts = _artifacts(found, job, number)
            for artifact in artifacts:
                _file(found, job, artifact)
            if not artifacts:
                st.caption("Nothing was written yet.")
            if building and not any(artifact.state == "building" for artifact in artifacts):
                st.rerun()

    listed()


def _artifacts(found: Visitor, job: Any, number: int | None) -> list[Any]:
    everything = found.client.artifacts(job.job)
    return everything if number is None else [a for a in everything if a.name.startswith(f"trial-{number}.")]


def _file(found: Visitor, job: Any, artifact: Any) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if artifact.state == "building":
            st.markdown(f":material/hourglass_top: {markdown(artifact.name)} is being written, loaded again and measured …")
            return
        if artifact.state == "failed":
            st.error(markdown(f"{artifact.name}: {artifact.failure or 'could not be written'}", 600), icon=":material/error:")
            return
        if (artifact.bytes or 0) > _MOST_BYTES:
            st.text(f"{plain(artifact.name)}, {file_bytes(artifact.bytes)}: too large for a page; `autoeff export {job.job} …` fetches it")
            return
        st.download_button(
            markdown(artifact.name, 80),
            data=_contents(found, artifact),
            file_name=f"{job.job}-{plain(artifact.name, 80)}",
            mime=artifact.media_type,
            icon=":material/download:",
            key=f"file_{artifact.name}",
            on_click="ignore",
        )
        st.caption(markdown(_said(artifact), 300))


def _contents(found: Visitor, artifact: Any) -> bytes | Callable[[], bytes]:
    """A small file at once and once; a large one when it is asked for."""
    if artifact.sha256 is None or (artifact.bytes or 0) > _SMALL_BYTES:
        return lambda: contents(found.client, artifact)
    kept: dict[str, bytes] = st.session_state.setdefault("files", {})
    if artifact.sha256 not in kept:
        kept[artifact.sha256] = contents(found.client, artifact)
    return kept[artifact.sha256]


def _said(artifact: Any) -> str:
    size = "" if artifact.bytes is None else file_bytes(artifact.bytes)
    facts = artifact.facts or {}
    if "measured" not in facts:
        return size
    quality = str(facts["quality"])
    checked = f"{quality} {figure(quality, facts['measured'])} after it was loaded again, {figure(quality, facts['trial'])} in the search"
    return f"{size} · {checked} · {figure('linear_bytes', facts.get('linear_bytes'))} of linears as packed"
