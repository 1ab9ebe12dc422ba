"""Searches that are submitted to the database: who drives them, who is told, who sees to what was lost.

Any number of coordinator processes may run; a lease in the database gives every job to one of them. Each also sends messages for queued
evaluations and ends the claims of dead workers. Nothing is kept here that the database does not have.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeff.errors import AutoeffError, Conflict, InputError, LeaseLost, StorageError
from autoeff.search.coordinator import Coordinator
from autoeff.search.crew import Away, Stopped
from autoeff.search.job import JobSpec
from autoeff.search.model import Plan, plan
from autoeff.search.preparations import Preparations
from autoeff.search.settings import Settings
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import Job, JobState, Message, Reply
from autoeff.search.storage.store import Store

__all__ = ["planned_again", "queue_of", "run_coordinators", "submit"]

_log = logging.getLogger(__name__)

Planned = Callable[[JobSpec, Settings, str | None], Plan]
Send = Callable[[Sequence[Message]], None]


def queue_of(spec: JobSpec) -> str:
    """The workers that evaluate a job.

    Raises:
        InputError: It names some that do not have its device.
    """
    by_device = "cpu" if spec.device == "cpu" else "gpu.any"
    queue = spec.queue or by_device
    if queue.partition(".")[0] != by_device.partition(".")[0]:
        raise InputError(f"queue {queue!r} has no workers with the device {spec.device!r}; leave one of them out")
    return queue


def submit(
    store: Store,
    spec: JobSpec,
    settings: Settings,
    *,
    owner: str | None = None,
    reply_for: Callable[[str], Reply] | None = None,
    planned: Planned = plan,
) -> Job:
    """Checks a job and stores it for the coordinators.

    Args:
        store: Where to.
        spec: The job.
        settings: Of this machine.
        owner: Whose it is.
        reply_for: From the job's id, the answer that the same request gets again.
        planned: May stand for `plan`: that of `Preparations` remembers.

    Raises:
        InputError: As `plan`.
        Conflict: The request has an answer already.
    """
    queue = queue_of(spec)
    found = planned(spec, settings, queue)
    job_id = uuid.uuid4().hex[:12]
    return store.create_job(
        job_id,
        spec.model_dump(mode="json"),
        found.preflight,
        found.space.to_json(),
        found.digest,
        owner=owner,
        queue=queue,
        reply=None if reply_for is None else reply_for(job_id),
    )


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
        self._prepared = Preparations()

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
            drive(self._store, job_id, self._settings, self._rung, stop, self._prepared.plan)
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
    planned: Planned = plan,
) -> dict[str, Any]:
    """Searches for one submitted job, evaluated by workers elsewhere, to its end.

    Args:
        store: Holds the job.
        job_id: The job.
        settings: Of this machine.
        rung: Set whenever work was queued.
        stop: Set when this process is to end.
        planned: As of `submit`.

    Raises:
        Stopped: The job was paused or cancelled, or `stop` set.
        Conflict: Another process drives it.
        AutoeffError: As `Coordinator.run`. A job that cannot be planned has failed.
    """
    job = store.job(job_id)
    assert job.queue is not None
    try:
        found = planned_again(job, settings, planned)
    except Exception as error:
        if (after := _after(error)) is not None:
            _fail(store, job_id, settings, str(after[1]))
        raise
    crew = Away(store, job.queue, rung, stop)
    coordinator = Coordinator(store, job_id, found, Path(), settings, lambda progress: None, crew)
    return coordinator.run(_after)


def planned_again(job: Job, settings: Settings, planned: Planned = plan) -> Plan:
    """The plan of a submitted job, found to be what it was.

    Raises:
        InputError: As `plan`, or it is not.
    """
    found = planned(JobSpec.parse(job.spec), settings, job.queue)
    if found.digest != job.setup_digest:
        raise InputError("its model, its text or this version is no longer what it was when it was submitted; submit it again")
    return found


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
