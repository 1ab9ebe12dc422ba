"""Workers, and what they run on."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from autoeff.api.access import Reader
from autoeff.api.context import Server
from autoeff.api.schemas import HardwarePage

__all__ = ["router"]

router = APIRouter(prefix="/v1/hardware", tags=["hardware"])


@router.get("", response_model=HardwarePage)
def list_workers(server: Server, key: Reader) -> Any:
    """Workers of the last day, the newest first."""
    items = [
        {
            "worker": worker.id,
            "kind": worker.kind,
            "queues": list(worker.queues),
            "alive": worker.alive,
            "busy": worker.evaluation_id is not None,
            "started": worker.started_at.isoformat(timespec="seconds"),
            "facts": dict(worker.facts),
        }
        for worker in server.store.workers()
    ]
    return server.roots.hide({"items": items})
