"""Stores a job for the coordinators and workers of a server."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from autoeff.errors import InputError
from autoeff.search.job import JobSpec
from autoeff.search.model import Plan, plan
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Reply
from autoeff.search.storage.store import Store

__all__ = ["queue_of", "submit"]


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
    planned: Callable[[JobSpec, Settings, str | None], Plan] = plan,
) -> str:
    """Checks a job and stores it for the coordinators; returns its id.

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
    store.create_job(
        job_id,
        spec.model_dump(mode="json"),
        found.preflight,
        found.space.to_json(),
        found.digest,
        owner=owner,
        queue=queue,
        reply=None if reply_for is None else reply_for(job_id),
    )
    return job_id
