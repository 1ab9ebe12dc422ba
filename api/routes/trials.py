"""The trials of a job."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from autoeff.api.bodies import body_of, documented_body
from autoeff.api.context import Server
from autoeff.api.dependencies import NOT_MODIFIED, Cursor, Limit, OwnedJob, OwnJob, TrialNumber, link_next, unchanged
from autoeff.api.problems import ApiError, described_problems
from autoeff.api.schemas import Artifact, AttemptPage, ExportRequest, TrialDetail, TrialPage
from autoeff.search.exporter import known_exporters
from autoeff.search.facts import attempt_facts
from autoeff.search.results import page_of
from autoeff.search.storage.records import Origin, State

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs/{job_id}/trials", tags=["trials"])


@router.get("", response_model=TrialPage, response_model_exclude_unset=True, responses=described_problems(404, 422))
def list_trials(
    server: Server,
    job: OwnedJob,
    request: Request,
    response: Response,
    limit: Limit = 100,
    cursor: Cursor = None,
    state: Annotated[list[State] | None, Query(description="Only these; may be repeated.", max_length=6)] = None,
    origin: Annotated[Origin | None, Query(description="Only those that it proposed.")] = None,
) -> Any:
    """Trials by number. What is measured on held-out text stands in the rows of the search trials too."""
    listing = f"trials {job.id} {sorted(state or [])} {origin}"
    after = server.cursors.read(listing, cursor)
    trials = server.store.trials(job.id, -1 if after is None else after, limit, states=state, origin=origin)
    following = server.cursors.write(listing, trials[-1].number) if len(trials) == limit else None
    return server.roots.hide({"items": page_of(server.store, job, trials), "next": link_next(request, response, following)})


@router.get(
    "/{number}",
    response_model=TrialDetail,
    response_model_exclude_unset=True,
    responses={**NOT_MODIFIED, **described_problems(404, 422)},
)
def get_trial(server: Server, job: OwnedJob, number: TrialNumber, request: Request, response: Response) -> Any:
    """One trial, with every try at it and its log."""
    if (same := unchanged(request, response, job)) is not None:
        return same
    trial = server.store.trial(job.id, number)
    (row,) = page_of(server.store, job, [trial])
    return server.roots.hide(row | {"attempts": attempt_facts(server.store.attempts(*trial.evaluations))})


@router.get(
    "/{number}/attempts",
    response_model=AttemptPage,
    responses={**NOT_MODIFIED, **described_problems(404, 422)},
)
def list_attempts(server: Server, job: OwnedJob, number: TrialNumber, request: Request, response: Response) -> Any:
    """Every try at a trial, the first one first: who tried, when, what came of it, and the end of what it printed."""
    if (same := unchanged(request, response, job)) is not None:
        return same
    trial = server.store.trial(job.id, number)
    return server.roots.hide({"items": attempt_facts(server.store.attempts(*trial.evaluations))})


@router.post(
    "/{number}/export",
    status_code=202,
    response_model=Artifact,
    responses=described_problems(404, 409, 408, 413, 415, 422),
    openapi_extra=documented_body(ExportRequest),
)
def export(
    server: Server, job: OwnJob, number: TrialNumber, asked: Annotated[ExportRequest, Depends(body_of(ExportRequest))], response: Response
) -> Any:
    """Writes a trial's configuration out, loads it in a fresh process and measures it again; the archive is one of the job's artifacts."""
    trial = server.store.trial(job.id, number)
    if trial.state is not State.SUCCEEDED or trial.split != "search":
        raise ApiError(
            409,
            "conflict",
            f"trial {number} is {trial.state} on the {trial.split} text; only one measured on the search text can be written",
        )
    if asked.format not in known_exporters():
        raise ApiError(422, "invalid-input", f"format {asked.format!r} is unknown; known: {', '.join(sorted(known_exporters()))}")
    archive = server.exports.request(job.id, number, asked.format)
    href = f"/v1/jobs/{job.id}/artifacts/{archive['name']}"
    response.headers["Location"] = href
    return server.roots.hide(archive | {"href": href})
