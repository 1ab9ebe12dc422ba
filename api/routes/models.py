"""Models that a job may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from autoeff.api.access import Reader
from autoeff.api.context import Server
from autoeff.api.roots import bundled_models
from autoeff.api.schemas import ModelPage

__all__ = ["router"]

_CONFIG_BYTES = 1 << 20

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelPage)
def list_models(server: Server, key: Reader) -> dict[str, Any]:
    """The bundled models, and those under the folders that this server was given."""
    bundled = set(bundled_models())
    items = [
        {"model": name, "model_type": _model_type(folder), "bytes": _weight_bytes(folder), "bundled": name in bundled}
        for name, folder in server.roots.models()
    ]
    return {"items": items, "hub": server.roots.hub}


def _model_type(folder: Path) -> str | None:
    """As `config.json` says, which is data: nothing is imported for it."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= _CONFIG_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return None
    name = found.get("model_type") if isinstance(found, dict) else None
    return name[:80] if isinstance(name, str) else None


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
