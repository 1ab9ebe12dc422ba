"""Searches that are submitted to the database: who drives them, who is told, who sees to what was lost.

Any number of coordinator processes may run; a lease in the database gives every job to one of them. Each also sends messages for queued
evaluations and ends the claims of dead workers. Nothing is kept here that the database does not have, and neither the model nor its text is
needed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeff.errors import AutoeffError, Conflict, LeaseLost, StorageError
from autoeff.search.coordinator import Coordinator
from autoeff.search.crew import Away, Stopped
from autoeff.search.planned import PlannedJob
from autoeff.search.settings import Settings
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import JobState, Message
from autoeff.search.storage.store import Store

__all__ = ["drive", "run_coordinators"]

_log = logging.getLogger(__name__)

Send = Callable[[Sequence[Message]], None]


def run_coordinators(settings: Settings, stop: threading.Event) -> None:
    """Drives submitted jobs until `stop` is set; then lets go of them, so that any other process can go on at once.

    Raises:
        InputError: The database or the broker of `settings` cannot be used.
    """
    send = None
    if settings.broker_url is not None:
        from autoeff.search.celery_app import sender  # without a broker, nothing of Celery is needed

        send = sender(settings.broker_url)
    with Store.open(settings.database) as store:
        _Office(store, settings, send, stop).run()


@dataclass(frozen=True)
class _Driven:
    """A job that this process drives.

    Attributes:
        stop: Set when it is to be let go of.
    """

    queue: str
    thread: threading.Thread
    stop: threading.Event


class _Office:
    def __init__(self, store: Store, settings: Settings, send: Send | None, stop: threading.Event) -> None:
        self._store, self._settings, self._send, self._stop = store, settings, send, stop
        self._me = process_identity()
        self._rung = threading.Event()
        self._driven: dict[str, _Driven] = {}

    def run(self) -> None:
        helpers = [threading.Thread(target=self._reap, name="reaper")]
        if self._send is not None:
            helpers.append(threading.Thread(target=self._post, args=(self._send,), name="postman"))
        for helper in helpers:
            helper.start()
        while not self._stop.is_set():
            self._driven = {job_id: driven for job_id, driven in self._driven.items() if driven.thread.is_alive()}
            with suppress(StorageError):  # whoever drives a job says so
                self._take_up()
            self._stop.wait(self._settings.poll_s)
        for driven in self._driven.values():
            driven.stop.set()
        for thread in (*helpers, *(driven.thread for driven in self._driven.values())):
            thread.join()

    def _take_up(self) -> None:
        """Drives what waits, the oldest first; where that is too much, jobs that nobody evaluates make room for others."""
        waiting = {job_id: queue for job_id, queue in self._store.waiting_jobs(self._me).items() if job_id not in self._driven}
        if not waiting:
            return
        staffed = {queue for worker in self._store.workers() if worker.alive for queue in worker.queues}
        ordered = sorted(waiting.items(), key=lambda item: item[1] not in staffed)
        room = self._settings.coordinated_jobs - len(self._driven)
        idle = [driven for driven in self._driven.values() if driven.queue not in staffed and not driven.stop.is_set()]
        pressing = sum(queue in staffed for _, queue in ordered[room:]) - sum(driven.stop.is_set() for driven in self._driven.values())
        for driven in idle[: max(0, pressing)]:
            driven.stop.set()
        for job_id, queue in ordered[:room]:
            stop = threading.Event()
            self._driven[job_id] = _Driven(queue, threading.Thread(target=self._drive, args=(job_id, stop), name=f"job {job_id}"), stop)
            self._driven[job_id].thread.start()

    def _drive(self, job_id: str, stop: threading.Event) -> None:
        """Drives one job as far as it goes; what stays undone is found again by `waiting_jobs`."""
        try:
            drive(self._store, job_id, self._settings, self._rung, stop)
        except (Conflict, LeaseLost, Stopped) as error:
            _log.info("job %s: %s", job_id, error)
        except StorageError as error:
            _log.warning("job %s: %s", job_id, error)
        except Exception:
            _log.exception("job %s failed", job_id)

    def _post(self, send: Send) -> None:
        """Sends messages; one that gets lost is due again later."""
        while not self._stop.is_set():
            self._rung.wait(min(self._settings.poll_s, self._settings.resend_s))
            self._rung.clear()
            try:
                if messages := self._store.due(self._settings.resend_s):
                    send(messages)
            except AutoeffError as error:
                _log.warning("%s", error)
            except Exception:  # without this thread workers would hear of nothing
                _log.exception("messages are not sent")

    def _reap(self) -> None:
        """Ends claims of the dead. After an outage, also one before its start, workers have a whole lease to report again."""
        lease_s = self._settings.lease_s
        judged_from = time.monotonic() + lease_s
        while not self._stop.wait(lease_s / 4):
            begun = time.monotonic()
            try:
                self._store.jobs(limit=1)
                if time.monotonic() > begun + lease_s / 4:  # a database that does not answer is away, too
                    judged_from = time.monotonic() + lease_s
                if time.monotonic() >= judged_from and self._store.reap():
                    self._rung.set()
            except StorageError as error:
                _log.warning("%s", error)
                judged_from = time.monotonic() + lease_s
            except Exception:  # without this thread what is lost would stay so
                _log.exception("claims of dead workers are not ended")


def drive(
    store: Store,
    job_id: str,
    settings: Settings,
    rung: threading.Event,
    stop: threading.Event,
) -> dict[str, Any]:
    """Searches for one submitted job, evaluated by workers elsewhere, to its end.

    Args:
        store: Holds the job.
        job_id: The job.
        settings: Of this machine.
        rung: Set whenever work was queued.
        stop: Set when this process is to end.

    Raises:
        Stopped: The job was paused or cancelled, or `stop` set.
        Conflict: Another process drives it.
        AutoeffError: As `Coordinator.run`. A job that cannot be read has failed.
    """
    job = store.job(job_id)
    assert job.queue is not None
    try:
        planned = PlannedJob.stored(job)
    except Exception as error:
        if (after := _after(error)) is not None:
            _fail(store, job_id, settings, str(after[1]))
        raise
    crew = Away(store, job.queue, rung, stop)
    coordinator = Coordinator(store, job_id, planned, Path(), settings, lambda progress: None, crew)
    return coordinator.run(_after)


def _after(error: BaseException) -> tuple[JobState, str | None] | None:
    """What becomes of a job after an error: what may be over soon is tried again."""
    if isinstance(error, LeaseLost | StorageError) or not isinstance(error, Exception):
        return None
    return JobState.FAILED, str(error) if isinstance(error, AutoeffError) else f"{type(error).__name__}: {error}"


def _fail(store: Store, job_id: str, settings: Settings, message: str) -> None:
    fence = store.acquire_coordinator(job_id, process_identity(), settings.lease_s)
    try:
        store.set_job_state(job_id, fence, JobState.FAILED, error=message)
    finally:
        store.release_coordinator(job_id, fence)
