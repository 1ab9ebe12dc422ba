"""Whether the server lives, whether it can work, and its metrics."""

from __future__ import annotations

import shutil

from fastapi import APIRouter, Response

from autoeff.api.access import Admin
from autoeff.api.context import Context, Server
from autoeff.api.schemas import Health
from autoeff.errors import AutoeffError

__all__ = ["guarded", "router"]

_DISK_BYTES = 1 << 30
_BROKER_S = 0.5

router = APIRouter(tags=["health"])
"""The two routes that need no key: they say nothing but whether."""
guarded = APIRouter(tags=["health"])


@router.get("/livez", response_class=Response, responses={200: {"description": "The process lives."}})
def live() -> Response:
    """Whether the process answers."""
    return Response(b"ok\n", media_type="text/plain")


@router.get("/readyz", responses={503: {"description": "It cannot work now.", "model": Health}})
def ready(server: Server, response: Response) -> Health:
    """Whether jobs can be taken: the database can be written, the disk has room.

    A broker that does not answer is `degraded` and no more: what is queued is sent again when it is back.
    """
    checks = {"database": _database(server), "disk": _disk(server)}
    if server.settings.broker_url is not None:
        checks["broker"] = _broker(server.settings.broker_url)
    working = "failed" not in checks.values()
    response.status_code = 200 if working else 503
    return Health.model_validate({"ready": working, "checks": checks})


@guarded.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(server: Server, key: Admin) -> Response:
    """Metrics in Prometheus's text format."""
    server.metrics.streams.set(server.feed.streams)
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _database(server: Context) -> str:
    try:
        server.replies.sweep()  # a write that the database needs anyway
    except AutoeffError:
        return "failed"
    return "ok"


def _disk(server: Context) -> str:
    folder = next(path for path in (server.settings.home, *server.settings.home.absolute().parents) if path.exists())
    return "ok" if shutil.disk_usage(folder).free > _DISK_BYTES else "failed"


def _broker(url: str) -> str:
    from redis import Redis, RedisError  # a server without a broker needs nothing of it

    try:
        with Redis.from_url(url, socket_connect_timeout=_BROKER_S, socket_timeout=_BROKER_S) as client:
            client.ping()
    except (RedisError, OSError, ValueError):
        return "degraded"
    return "ok"
