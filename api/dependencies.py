"""What several routes ask for, as annotated aliases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request, Response

from autoeff.api.access import Reader, Writer
from autoeff.api.context import Context, Server
from autoeff.api.problems import ApiError
from autoeff.errors import NotFound
from autoeff.search.keys import Key
from autoeff.search.storage.records import Job

__all__ = [
    "NOT_MODIFIED",
    "Cursor",
    "JobId",
    "Limit",
    "OwnJob",
    "OwnedJob",
    "OwnedJobs",
    "TrialNumber",
    "check_driven_here",
    "etag",
    "link_next",
    "same_version",
    "unchanged",
]

NOT_MODIFIED: Mapping[int | str, dict[str, Any]] = {304: {"description": "It is as `If-None-Match` says."}}
"""Of a route that says which state of a job it shows."""

_JOB = re.compile(r"[0-9a-f]{12}")
_ETAG = re.compile(r'(?:W/)?"(\d{1,12})\.(\d{1,12})"')

JobId = Annotated[str, Path(description="Id of a job.", examples=["0123456789ab"])]
TrialNumber = Annotated[int, Path(ge=0, lt=2**31, description="Number of a trial, counted from 0.")]
Limit = Annotated[int, Query(ge=1, le=500, description="Items of a page.")]
Cursor = Annotated[str | None, Query(max_length=1000, description="`next` of the page before.")]


def _found(job_id: str, server: Context, key: Key) -> Job:
    absent = ApiError(404, "not-found", "there is no job of this id")
    if not _JOB.fullmatch(job_id):
        raise absent
    try:
        return server.store.job(job_id, owner=key.owner)
    except NotFound:
        raise absent from None


def _readable(job_id: JobId, server: Server, key: Reader) -> Job:
    return _found(job_id, server, key)


def _writable(job_id: JobId, server: Server, key: Writer) -> Job:
    return _found(job_id, server, key)


def _compared(
    server: Server,
    key: Reader,
    job: Annotated[list[str], Query(min_length=2, max_length=8, description="Id of a job; two to eight of them.")],
) -> list[Job]:
    return [_found(one, server, key) for one in job]


OwnedJob = Annotated[Job, Depends(_readable)]
"""A job of the caller's, to read."""
OwnJob = Annotated[Job, Depends(_writable)]
"""A job of the caller's, to change."""


OwnedJobs = Annotated[list[Job], Depends(_compared)]
"""Several of them."""


def etag(job: Job) -> str:
    """The version, which changes of state and budget move, and the last event, which every trial moves too."""
    return f'"{job.version}.{job.events}"'


def unchanged(request: Request, response: Response, job: Job) -> Response | None:
    """Says which state of a job the answer shows; a 304 where the caller has that one."""
    tag = etag(job)
    response.headers["ETag"] = tag
    known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return Response(status_code=304, headers={"ETag": tag}) if tag in known else None


def same_version(request: Request, job: Job) -> int:
    """The version in `If-Match`, seen to be the job's. Trials may have been added since.

    Raises:
        ApiError: 428 without the header, 412 when the job has changed.
    """
    given = request.headers.get("if-match")
    if given is None:
        raise ApiError(428, "precondition-required", "send the ETag of the job that you saw as If-Match")
    if given.strip() == "*":
        return job.version
    versions = [int(match[1]) for part in given.split(",") if (match := _ETAG.fullmatch(part.strip()))]
    if job.version not in versions:
        raise ApiError(412, "precondition-failed", "the job has changed since; get it again", {"ETag": etag(job)})
    return job.version


def check_driven_here(job: Job) -> None:
    """Refuses to go on with a job that no coordinator of a server drives.

    Raises:
        ApiError: 409.
    """
    if job.queue is None:
        raise ApiError(
            409, "conflict", f"job {job.id} was begun without a server; `autoeff resume` goes on with it where its run directory is"
        )


def link_next(request: Request, response: Response, cursor: str | None) -> str | None:
    """Says where the following page is, in the header too."""
    if cursor is not None:
        response.headers["Link"] = f'<{request.url.include_query_params(cursor=cursor)}>; rel="next"'
    return cursor
