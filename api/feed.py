"""Events as they happen: one reader of the database for all streams of this process.

A stream first replays what the table holds after the last event that its client has seen, then takes what the reader hands out. Numbers
tell the two apart, so nothing is missed or sent twice, however late a client comes. A client that does not keep up is dropped, never an
event: it connects again and goes on from the number that it has.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from autoeff.api.problems import ApiError
from autoeff.errors import StorageError
from autoeff.search.storage.records import Event, JobState
from autoeff.search.storage.store import Store

__all__ = ["Feed", "Told"]

_PAGE = 500
_LAST = {f"job.{state}" for state in JobState if state.terminal}
_WAITING = 100
"""Looks of the reader whose events may wait for a client; one that is further behind is dropped."""
_SILENT_S = 15.0
_log = logging.getLogger(__name__)


class Told(NamedTuple):
    """An event as streams send it, written once for all of them."""

    seq: int
    kind: str
    data: bytes


class Feed:
    """Hands the events of jobs to the streams that follow them.

    Args:
        store: Has the events.
        every_s: How often the table is looked at while someone follows.
        per_key: Streams that a key may have open.
    """

    def __init__(self, store: Store, every_s: float = 0.25, per_key: int = 5) -> None:
        self._store, self._every_s, self._per_key = store, every_s, per_key
        self._followers: dict[str, set[asyncio.Queue[Sequence[Told] | None]]] = defaultdict(set)
        self._last: dict[str, int] = {}
        self._open: dict[str, int] = defaultdict(int)
        self._reader: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "feed")  # its own: requests that crowd in must not keep events from those who wait

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

    async def follow(self, job_id: str, after: int) -> AsyncGenerator[Sequence[Told]]:
        """The events of a job with a number above `after`, as they come, until it has ended; then the generator ends too.

        Nothing is yielded once in a while where nothing happens, so that the connection is seen to be alive.
        """
        queue: asyncio.Queue[Sequence[Told] | None] = asyncio.Queue(_WAITING)
        self._followers[job_id].add(queue)
        try:
            while page := await run_in_threadpool(self._page, job_id, after):
                after = page[-1].seq
                yield page
                if len(page) < _PAGE:
                    break
            self._last.setdefault(job_id, after)  # never further: other streams may wait for what this one has read itself
            self._read()
            ended = await self._ended(job_id, after)
            while not ended:
                handed: Sequence[Told] | None = ()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SILENT_S):
                        handed = await queue.get()
                if handed is None:
                    return
                if handed and handed[0].seq <= after:  # while this stream was replaying
                    handed = [told for told in handed if told.seq > after]
                    if not handed:
                        continue
                after = handed[-1].seq if handed else after
                yield handed
                ended = any(told.kind in _LAST for told in handed) and await self._ended(job_id, after)
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
        self._thread.shutdown()

    async def _ended(self, job_id: str, after: int) -> bool:
        """Whether the job has, and this was its last event."""
        state, last = (await run_in_threadpool(self._store.heads, [job_id]))[job_id]
        return state.terminal and last <= after

    def _page(self, job_id: str, after: int) -> list[Told]:
        return [_told(event) for event in self._store.events(job_id, after, _PAGE)]

    def _read(self) -> None:
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._hand_out())

    async def _hand_out(self) -> None:
        while self._followers:
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._thread, self._new, dict(self._last))
            except StorageError as error:  # streams wait, and hear of what happened when the database is back
                _log.warning("%s", error)
                found = {}
            for job_id, events in found.items():
                if job_id in self._last:  # else its last stream ended meanwhile
                    self._last[job_id] = events[-1].seq
                for queue in list(self._followers.get(job_id, ())):
                    if queue.full():
                        _drop(queue)
                    else:
                        queue.put_nowait(events)
            await asyncio.sleep(self._every_s)

    def _new(self, last: Mapping[str, int]) -> dict[str, Sequence[Told]]:
        heads = self._store.heads(last)
        found = {job_id: self._page(job_id, after) for job_id, after in last.items() if heads[job_id][1] > after}
        return {job_id: events for job_id, events in found.items() if events}


def _told(event: Event) -> Told:
    data = json.dumps({"at": event.at.isoformat(), **event.body})
    return Told(event.seq, event.kind, format_sse_event(data_str=data, event=event.kind, id=str(event.seq)))


def _drop(queue: asyncio.Queue[Sequence[Told] | None]) -> None:
    while not queue.empty():
        queue.get_nowait()
    queue.put_nowait(None)
