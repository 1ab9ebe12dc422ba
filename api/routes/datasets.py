"""Texts that a job may name."""

from __future__ import annotations

from itertools import islice
from typing import Any

from fastapi import APIRouter

from autoeff.api.access import Reader
from autoeff.api.context import Server
from autoeff.api.schemas import DataPage

__all__ = ["router"]

_SHOWN = 1000

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


@router.get("", response_model=DataPage)
def list_texts(server: Server, key: Reader) -> dict[str, Any]:
    """Files under the folders that this server was given, the first thousand; bundled models bring a text of their own."""
    items = [{"source": name, "bytes": path.stat().st_size} for name, path in islice(server.roots.texts(), _SHOWN)]
    return {"items": items, "hub": server.roots.hub}
