"""What happens to a job, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from autoeff.api.access import Reader
from autoeff.api.context import Server
from autoeff.api.dependencies import OwnedJob
from autoeff.api.problems import described_problems

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs", tags=["events"])


async def _counted(server: Server, key: Reader) -> AsyncIterator[None]:
    """Counts the stream before it begins, so that one too many is refused with a status."""
    server.feed.enter(key.prefix)
    try:
        yield
    finally:
        server.feed.leave(key.prefix)


@router.get(
    "/{job_id}/events", response_class=EventSourceResponse, responses=described_problems(404, 422), dependencies=[Depends(_counted)]
)
async def follow(
    server: Server,
    job: OwnedJob,
    last_event_id: Annotated[int, Header(ge=0, lt=2**53, description="Number of the last event that was seen.")] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """Every event after `Last-Event-ID`, those of the past first, until the job has ended; the last one is `end`.

    Each has the event's number as `id`, its kind as `event` and its body as `data`.
    """
    async for event in server.feed.follow(job.id, last_event_id):
        yield ServerSentEvent(data={"at": event.at.isoformat(), **event.body}, event=event.kind, id=str(event.seq))
    state = (await run_in_threadpool(server.store.job, job.id)).state
    if state.terminal:  # else this client was too slow, or the server stops
        yield ServerSentEvent(data={"state": str(state)}, event="end")
