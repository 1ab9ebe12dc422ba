"""Jobs: submit, look, steer."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from autoeff.api import work
from autoeff.api.access import Reader, Writer
from autoeff.api.bodies import body_of, documented_body
from autoeff.api.context import Context, Server
from autoeff.api.dependencies import (
    NOT_MODIFIED,
    Cursor,
    Limit,
    OwnedJob,
    OwnedJobs,
    OwnJob,
    check_driven_here,
    etag,
    link_next,
    same_version,
    unchanged,
)
from autoeff.api.problems import ApiError, ProblemItem, described_problems
from autoeff.api.schemas import Accepted, Budgets, ComparisonRow, JobDetail, JobPage, Preflight
from autoeff.errors import Conflict, FailureClass
from autoeff.search.facts import columns_of, job_facts
from autoeff.search.job import JobSpec
from autoeff.search.storage.idempotency import KEPT_S, Given
from autoeff.search.storage.records import Job, JobState, Reply
from autoeff.spaces.configuration import digest_of

__all__ = ["router"]

_TRIALS = 100_000

router = APIRouter(tags=["jobs"])

Body = Annotated[JobSpec, Depends(body_of(JobSpec))]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$", description="Names the request, so that it may be repeated."),
]


@router.post(
    "/v1/jobs",
    status_code=202,
    response_model=Accepted,
    responses=described_problems(409, 408, 413, 415, 422),
    openapi_extra=documented_body(JobSpec),
)
async def submit(
    server: Server, key: Writer, spec: Body, request: Request, response: Response, idempotency_key: IdempotencyKey = None
) -> Any:
    """Checks a job and stores it; coordinators take it from there.

    A request that is repeated with the same `Idempotency-Key` within a day is answered as the first time, and starts nothing.
    """
    reply = None
    if idempotency_key is not None:
        reply = Reply(key.prefix, idempotency_key, digest_of(spec.model_dump(mode="json")), 202, {}, KEPT_S)
        if (given := await run_in_threadpool(server.replies.find, key.prefix, idempotency_key)) is not None:
            return _again(given, reply, response)
    await run_in_threadpool(_check_quota, server, key.owner)
    job = await run_in_threadpool(_checked, server, spec)
    try:
        # With its hash: another job under the same key is no repetition, and is told so by the stored reply.
        request_id = uuid.uuid4().hex if reply is None else f"{reply.idempotency_key} {reply.request_hash}"
        name = f"submit {key.prefix} {request_id}"
        job_id = await server.backroom.ask(name, work.submitted, job.model_dump(mode="json"), server.settings, key.owner, reply)
    except Conflict:
        if reply is None or (given := await run_in_threadpool(server.replies.find, key.prefix, reply.idempotency_key)) is None:
            raise
        return _again(given, reply, response)
    return _accepted(job_id, response)


@router.post(
    "/v1/jobs:validate",
    response_model=Preflight,
    responses=described_problems(408, 413, 415, 422),
    openapi_extra=documented_body(JobSpec),
)
async def validate(server: Server, key: Writer, spec: Body) -> Any:
    """What is known of a job before any weight is loaded: sizes, limits, the least reachable, time. Starts nothing."""
    job = await run_in_threadpool(_checked, server, spec)
    fields = job.model_dump(mode="json")
    name = f"validate {key.owner} {digest_of(fields)}"
    return server.roots.hide(await server.backroom.ask(name, work.preflight, fields, server.settings))


@router.get("/v1/jobs:compare", response_model=ComparisonRow, responses=described_problems(404, 422))
async def compare(server: Server, jobs: OwnedJobs) -> Any:
    """What several jobs found, the best of each at common budgets, and in what they differ. They must have searched the same.

    Jobs are named by repeating `job`.
    """
    name = f"compare {[(job.id, job.events) for job in jobs]}"
    return server.roots.hide(await server.backroom.ask(name, work.compared, [job.id for job in jobs], server.settings))


@router.get("/v1/jobs", response_model=JobPage, responses=described_problems(422))
def list_jobs(
    server: Server,
    key: Reader,
    request: Request,
    response: Response,
    limit: Limit = 100,
    cursor: Cursor = None,
    state: Annotated[list[JobState] | None, Query(description="Only these; may be repeated.", max_length=7)] = None,
) -> Any:
    """The caller's jobs, the newest first."""
    listing = f"jobs {key.owner} {sorted(state or [])}"
    jobs = server.store.jobs(limit, server.cursors.read(listing, cursor), owner=key.owner, states=state)
    following = server.cursors.write(listing, jobs[-1].id) if len(jobs) == limit else None
    return server.roots.hide({"items": [job_facts(job) for job in jobs], "next": link_next(request, response, following)})


@router.get("/v1/jobs/{job_id}", response_model=JobDetail, responses={**NOT_MODIFIED, **described_problems(404, 422)})
def get_job(server: Server, job: OwnedJob, request: Request, response: Response) -> Any:
    """A job: its state, counters and description."""
    return unchanged(request, response, job) or server.roots.hide(_detail(job))


@router.get("/v1/jobs/{job_id}/result", response_model=dict[str, Any], responses={**NOT_MODIFIED, **described_problems(404, 422)})
def get_result(server: Server, job: OwnedJob, request: Request, response: Response) -> Any:
    """The end table of a finished search, its damage table, and what else its report shows."""
    if job.result is None:
        raise ApiError(404, "not-found", f"job {job.id} is {job.state} and has no result (yet)")
    if (same := unchanged(request, response, job)) is not None:
        return same
    return server.roots.hide(dict(job.result))


@router.patch(
    "/v1/jobs/{job_id}",
    response_model=JobDetail,
    responses=described_problems(404, 409, 412, 408, 413, 415, 422, 428),
    openapi_extra=documented_body(Budgets)
    | {
        "parameters": [
            {"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}, "description": "The job's ETag."}
        ]
    },
)
def change_budget(
    server: Server, job: OwnJob, asked: Annotated[Budgets, Depends(body_of(Budgets))], request: Request, response: Response
) -> Any:
    """Changes the budget of a job that has not ended, also while it runs. `If-Match` holds while trials are added."""
    version = same_version(request, job)
    budget = asked.model_dump(exclude_unset=True)
    if not budget:
        raise ApiError(422, "invalid-input", "name trials or seconds", errors=[ProblemItem(detail="name trials or seconds", pointer="#")])
    if "trials" in budget and budget["trials"] is None:
        raise ApiError(
            422, "invalid-input", "a job always has a number of trials", errors=[ProblemItem(detail="is null", pointer="#/trials")]
        )
    return _changed(server, server.store.change_budget(job.id, budget, version), response)


@router.post("/v1/jobs/{job_id}/cancel", response_model=JobDetail, responses=described_problems(404, 409, 422))
def cancel(server: Server, job: OwnJob, response: Response) -> Any:
    """Ends a job: what is queued is dropped, what runs is stopped."""
    return _changed(server, server.store.cancel(job.id), response)


@router.post("/v1/jobs/{job_id}/pause", response_model=JobDetail, responses=described_problems(404, 409, 422))
def pause(
    server: Server,
    job: OwnJob,
    response: Response,
    mode: Annotated[Literal["finish", "now"], Query(description="Whether what runs is finished, or given back at once.")] = "finish",
) -> Any:
    """Stops proposing. What is given back is evaluated anew when the job goes on."""
    return _changed(server, server.store.pause(job.id, at_once=mode == "now"), response)


@router.post("/v1/jobs/{job_id}/resume", response_model=JobDetail, responses=described_problems(404, 409, 422))
def resume(server: Server, job: OwnJob, response: Response) -> Any:
    """Has a paused or failed job go on."""
    check_driven_here(job)
    return _changed(server, server.store.resume(job.id), response)


@router.post("/v1/jobs/{job_id}/retry-failed", response_model=JobDetail, responses=described_problems(404, 409, 422))
def retry_failed(
    server: Server,
    job: OwnJob,
    response: Response,
    classes: Annotated[
        list[FailureClass] | None, Query(alias="class", description="Only failures of these classes; may be repeated.", max_length=7)
    ] = None,
) -> Any:
    """Has the failed trials of a job that has not ended tried again, and the job go on. What failed stays with its attempts."""
    check_driven_here(job)
    return _changed(server, server.store.retry_failed(job.id, classes or ()), response)


def _checked(server: Context, spec: JobSpec) -> JobSpec:
    if spec.budget.trials > _TRIALS:
        message = f"budget.trials is {spec.budget.trials}; {_TRIALS} are allowed"
        raise ApiError(422, "invalid-input", message, errors=[ProblemItem(detail=message, pointer="#/budget/trials")])
    return server.roots.resolve(spec)


def _check_quota(server: Context, owner: str) -> None:
    most = server.settings.open_jobs
    if server.store.has_open_jobs(owner, most):
        raise ApiError(429, "quota", f"{owner} has {most} jobs that have not ended; wait, or cancel one", {"Retry-After": "60"})


def _accepted(job_id: str, response: Response) -> dict[str, Any]:
    response.headers["Location"] = f"/v1/jobs/{job_id}"
    return {"job": job_id, "links": _links(job_id)}


def _again(given: Given, reply: Reply, response: Response) -> dict[str, Any]:
    if given.request_hash != reply.request_hash:
        raise ApiError(422, "idempotency-key-reused", "this Idempotency-Key was sent with another job before; choose another key")
    response.headers["Idempotent-Replayed"] = "true"
    return _accepted(given.body["job"], response)


def _changed(server: Context, job: Job, response: Response) -> Any:
    response.headers["ETag"] = etag(job)
    return server.roots.hide(_detail(job))


def _detail(job: Job) -> dict[str, Any]:
    counts = job.counts
    return {
        **job_facts(job),
        "seconds": (job.budget or job.spec["budget"]).get("seconds"),
        "succeeded": counts.succeeded,
        "failed": counts.failed + counts.quarantined,
        "open": counts.open,
        "events": job.events,
        "version": job.version,
        "error": job.error,
        **columns_of(job),
        "spec": dict(job.spec),
        "preflight": dict(job.preflight),
        "links": _links(job.id),
    }


def _links(job_id: str) -> dict[str, str]:
    here = f"/v1/jobs/{job_id}"
    return {"self": here} | {name: f"{here}/{name}" for name in ("trials", "pareto", "points", "events", "result", "artifacts")}
