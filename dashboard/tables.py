"""How columns of tables write the values of measurements."""

from __future__ import annotations

from typing import Any

import streamlit as st

from autoeff.spaces.measurements import described

__all__ = ["column"]


def column(name: str, title: str | None = None) -> Any:
    """Of numbers, so that they sort; bytes and counts with prefixes."""
    unit = described(name).unit
    if unit == "bytes" or unit.startswith("bytes/"):
        return st.column_config.NumberColumn(title, format="bytes")
    return st.column_config.NumberColumn(title, format="compact" if unit.startswith("FLOP") else "%.4g")
