"""What the back room does: functions of plain arguments, each a few seconds of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from autoeff.search.job import JobSpec
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Reply
from autoeff.search.storage.store import Store

if TYPE_CHECKING:  # the engine, which a server loads after it has begun to listen
    from autoeff.search.preparations import Preparations

__all__ = ["compared", "preflight", "resolved", "submitted"]


def preflight(job: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What is known of a job before any weight is loaded.

    Raises:
        InputError: As `plan`.
    """
    from autoeff.search.facts import plan_facts
    from autoeff.search.submission import queue_of

    spec = JobSpec.parse(job)
    return plan_facts(_prepared().plan(spec, settings, queue_of(spec)), settings)


def submitted(job: Mapping[str, Any], settings: Settings, owner: str, reply: Reply | None) -> str:
    """Plans a job and stores it for the coordinators; returns its id, which the reply's body is told too.

    Raises:
        InputError: As `plan`.
        Conflict: The reply's request has an answer already.
    """
    from autoeff.search.submission import submit

    def reply_for(job_id: str) -> Reply:
        assert reply is not None
        return Reply(reply.key_prefix, reply.idempotency_key, reply.request_hash, reply.status, {"job": job_id}, reply.ttl_s)

    store = _store(settings.database)
    answer = None if reply is None else reply_for
    return submit(store, JobSpec.parse(job), settings, owner=owner, reply_for=answer, planned=_prepared().plan)


def resolved(job_id: str, limits: Sequence[str], settings: Settings, *, measure: bool = False) -> dict[str, Any]:
    """The best configuration of a job within new limits, from what was measured or what workers `measure` besides.

    Raises:
        InputError: As `resolve`.
    """
    from autoeff.search.resolve import resolve

    return resolve(job_id, limits, settings, measure=measure).to_json()


def compared(jobs: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Jobs side by side.

    Raises:
        InputError: As `compare`.
    """
    from autoeff.search.compare import compare

    return compare(jobs, settings).to_json()


@lru_cache(1)
def _prepared() -> Preparations:
    """What this process remembers of the models and texts of earlier requests."""
    from autoeff.search.preparations import Preparations

    return Preparations()


@lru_cache(1)
def _store(url: str) -> Store:
    """Open for as long as this process lives."""
    return Store.open(url)
