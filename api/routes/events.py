"""What happens to a job, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.concurrency import run_in_threadpool

from autoeff.api.access import Reader
from autoeff.api.context import Server
from autoeff.api.dependencies import OwnedJob
from autoeff.api.problems import described_problems

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs", tags=["events"])

_EVENT = {"type": "object", "properties": {name: {"type": "string"} for name in ("data", "event", "id")}}


async def _counted(server: Server, key: Reader) -> AsyncIterator[None]:
    """Counts the stream before it begins, so that one too many is refused with a status."""
    server.feed.enter(key.prefix)
    try:
        yield
    finally:
        server.feed.leave(key.prefix)


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}, **described_problems(404, 422)},
    dependencies=[Depends(_counted)],
)
async def follow(
    server: Server,
    job: OwnedJob,
    last_event_id: Annotated[
        int, Header(ge=0, lt=2**53, description="Number of the last event that was seen; one ahead of the job is its last.")
    ] = 0,
) -> EventSourceResponse:
    """Every event after `Last-Event-ID`, those of the past first, until the job has ended; the last one is `end`.

    Each has the event's number as `id`, its kind as `event` and its body as `data`.
    """
    after = min(last_event_id, job.events)  # a number that is yet to come would have every stream of the job wait for it

    async def stream() -> AsyncIterator[bytes]:
        async with aclosing(server.feed.follow(job.id, after)) as batches:
            async for batch in batches:
                yield b"".join(told.data for told in batch) or KEEPALIVE_COMMENT
        state, _ = (await run_in_threadpool(server.store.heads, [job.id]))[job.id]
        if state.terminal:  # else this client was too slow, or the server stops
            yield format_sse_event(event="end", data_str=json.dumps({"state": state}))

    return EventSourceResponse(stream(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
