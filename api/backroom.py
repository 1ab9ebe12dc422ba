"""Processes for what a server must not do itself: planning, solving for a new budget, exporting.

Calls go to a pool of processes, so that neither the interpreter lock nor the memory that a model takes is the server's. All are forked from
one that has loaded the engine, and share its memory. A process that dies takes its call with it and no more.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ParamSpec, TypeVar

from autoeff.api.problems import ApiError

__all__ = ["Backroom"]

_REMEMBERED = 200
Args = ParamSpec("Args")
Result = TypeVar("Result")


class Backroom:
    """A process that waits for work; it starts when it is first needed.

    Args:
        timeout_s: How long a request waits for an answer; less than proxies do.
    """

    def __init__(self, timeout_s: float = 20.0) -> None:
        self._timeout_s = timeout_s
        self._pool: ProcessPoolExecutor | None = None
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._starting = threading.Lock()

    async def ask(self, name: str, function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """What `function`, of a module, returns; its errors are raised here.

        What is asked again under its name while it is at work, as after a timeout, is not begun again.

        Raises:
            ApiError: 503: it takes long, or its process died.
        """
        task: asyncio.Task[Result] | None = self._asked.get(name)
        if task is None:
            if len(self._asked) > _REMEMBERED:  # answers that nobody came back for
                self._asked = {key: asked for key, asked in self._asked.items() if not asked.done()}
            task = self._asked[name] = asyncio.create_task(self._answered(function, *args, **kwargs))
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # which nobody may come back for
        try:
            result = await asyncio.wait_for(asyncio.shield(task), self._timeout_s)
        except TimeoutError:
            message = "this is being worked on and takes long; send the same request again to hear the end of it"
            raise ApiError(503, "working", message, {"Retry-After": "1"}) from None
        except BrokenProcessPool:
            self._asked.pop(name, None)
            raise ApiError(503, "unavailable", "the process that worked on this died; try again", {"Retry-After": "5"}) from None
        except BaseException:
            if task.done():
                self._asked.pop(name, None)
            raise
        self._asked.pop(name, None)
        return result

    async def _answered(self, function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        future = await asyncio.to_thread(lambda: self.start(function, *args, **kwargs))
        return await asyncio.wrap_future(future)

    def start(self, function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Future[Result]:
        """Begins, once the engine is loaded, and does not wait for the result."""
        with self._starting:
            if self._pool is None:
                context = multiprocessing.get_context("forkserver")
                context.set_forkserver_preload(["autoeff.api.engine"])
                self._pool = ProcessPoolExecutor(1, context, _leave_with_parent)
            try:
                return self._pool.submit(function, *args, **kwargs)
            except BrokenProcessPool:  # by an earlier call
                self._pool = None
            except (EOFError, OSError) as error:  # what forks the processes has died
                self._pool = None
                raise BrokenProcessPool(str(error)) from error
        return self.start(function, *args, **kwargs)

    def close(self) -> None:
        """Ends the processes; what has not begun never will."""
        if self._pool is not None:
            for process in list(self._pool._processes.values()):  # those at work, too; Python 3.14 has terminate_workers
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)


def _leave_with_parent() -> None:
    """Ends this process soon after the server that it works for, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells everybody of Ctrl-C
    server = multiprocessing.parent_process()
    assert server is not None

    def watch() -> None:
        server.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
