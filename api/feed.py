"""Events as they happen: one reader of the database for all streams of this process.

A stream first replays what the table holds after the last event that its client has seen, then takes what the reader hands out. Numbers
tell the two apart, so nothing is missed or sent twice, however late a client comes. A client that does not keep up is dropped, never an
event: it connects again and goes on from the number that it has.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from autoeff.api.problems import ApiError
from autoeff.search.storage.records import Event, JobState
from autoeff.search.storage.store import Store

__all__ = ["Feed"]

_PAGE = 500
_LAST = {f"job.{state}" for state in JobState if state.terminal}
_QUEUED = 1000
"""Events that may wait for a client; one that is further behind is dropped."""


class Feed:
    """Hands the events of jobs to the streams that follow them.

    Args:
        store: Has the events.
        every_s: How often the table is looked at while someone follows.
        per_key: Streams that a key may have open.
    """

    def __init__(self, store: Store, every_s: float = 0.25, per_key: int = 5) -> None:
        self._store, self._every_s, self._per_key = store, every_s, per_key
        self._followers: dict[str, set[asyncio.Queue[Event | None]]] = defaultdict(set)
        self._last: dict[str, int] = {}
        self._open: dict[str, int] = defaultdict(int)
        self._reader: asyncio.Task[None] | None = None

    @property
    def streams(self) -> int:
        """Open ones."""
        return sum(self._open.values())

    def enter(self, prefix: str) -> None:
        """Counts a stream of a key, before it begins.

        Raises:
            ApiError: 429: it has as many as it may.
        """
        if self._open[prefix] >= self._per_key:
            message = f"this key follows {self._per_key} jobs already; close one of the streams"
            raise ApiError(429, "too-many-requests", message, {"Retry-After": "5"})
        self._open[prefix] += 1

    def leave(self, prefix: str) -> None:
        """The end of a stream that `enter` counted."""
        self._open[prefix] -= 1
        if not self._open[prefix]:
            del self._open[prefix]

    async def follow(self, job_id: str, after: int) -> AsyncIterator[Event]:
        """The events of a job with a number above `after`, until it has ended; then the generator ends too."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(_QUEUED)
        self._followers[job_id].add(queue)
        try:
            while page := await run_in_threadpool(self._store.events, job_id, after, _PAGE):
                for event in page:
                    after = event.seq
                    yield event
            self._last.setdefault(job_id, after)  # never further: other streams may wait for what this one has read itself
            self._read()
            ended = await self._ended(job_id, after)
            while not ended:
                handed = await queue.get()
                if handed is None:
                    return
                if handed.seq <= after:  # while this stream was replaying
                    continue
                after = handed.seq
                yield handed
                ended = handed.kind in _LAST and await self._ended(job_id, after)
        finally:
            self._followers[job_id].discard(queue)
            if not self._followers[job_id]:
                del self._followers[job_id]
                self._last.pop(job_id, None)

    async def close(self) -> None:
        """Ends every stream."""
        for queue in [queue for queues in self._followers.values() for queue in queues]:
            _drop(queue)
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader

    async def _ended(self, job_id: str, after: int) -> bool:
        """Whether the job has, and this was its last event."""
        job = await run_in_threadpool(self._store.job, job_id)
        return job.state.terminal and job.events <= after

    def _read(self) -> None:
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._hand_out())

    async def _hand_out(self) -> None:
        while self._followers:
            found = await run_in_threadpool(self._new, dict(self._last))
            for job_id, events in found.items():
                if job_id in self._last:  # else its last stream ended meanwhile
                    self._last[job_id] = events[-1].seq
                for queue in list(self._followers.get(job_id, ())):
                    for event in events:
                        if queue.full():
                            _drop(queue)
                            break
                        queue.put_nowait(event)
            await asyncio.sleep(self._every_s)

    def _new(self, last: dict[str, int]) -> dict[str, Sequence[Event]]:
        found = ((job_id, self._store.events(job_id, after, _PAGE)) for job_id, after in last.items())
        return {job_id: events for job_id, events in found if events}


def _drop(queue: asyncio.Queue[Event | None]) -> None:
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(None)
