"""Measured times of operations: what latency limits are composed of on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query

from autoeff.api.access import Reader
from autoeff.api.context import Server
from autoeff.api.problems import described_problems
from autoeff.api.schemas import LatencyPage

__all__ = ["router"]

_FORMAT = 1
_FILE_BYTES = 64 << 20

router = APIRouter(prefix="/v1/kernel-latencies", tags=["hardware"])


@router.get("", response_model=LatencyPage, responses=described_problems(422))
def list_latencies(
    server: Server,
    key: Reader,
    operation: Annotated[str, Query(max_length=40, pattern="^[a-z0-9_]*$", description="Only this one, such as linear.")] = "",
    limit: Annotated[int, Query(ge=1, le=5000, description="Operations of a table.")] = 500,
) -> Any:
    """Every table of a device and its versions, with its operations by name and sizes."""
    return {"items": [_shown(table, operation, limit) for table in _tables(server.settings.home / "latency")]}


def _tables(folder: Path) -> Iterator[dict[str, Any]]:
    """The files that searches and `autoeff kernels` write, as they are: reading them needs no torch."""
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_bytes()) if path.stat().st_size <= _FILE_BYTES else {}
        except (OSError, ValueError):  # removed or replaced this moment
            continue
        if isinstance(found, dict) and found.get("format") == _FORMAT:
            yield found


def _shown(table: dict[str, Any], operation: str, limit: int) -> dict[str, Any]:
    entries = [(name, entry) for name, entry in sorted(table["entries"].items()) if operation in ("", name.partition(" ")[0])]
    rows = [{"operation": name, **entry} for name, entry in entries[:limit]]
    return {name: table[name] for name in ("device", "versions", "threads", "date")} | {"total": len(entries), "items": rows}
