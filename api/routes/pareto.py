"""What a job has found: its front, the points of a picture, and the answer for another budget."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from autoeff.api import work
from autoeff.api.access import Reader, needs
from autoeff.api.bodies import body_of, documented_body
from autoeff.api.context import Server
from autoeff.api.dependencies import NOT_MODIFIED, OwnedJob, check_driven_here, unchanged
from autoeff.api.problems import described_problems
from autoeff.api.schemas import Front, Points, ResolutionRow, ResolveRequest
from autoeff.search.facts import columns_of
from autoeff.search.points import points_of
from autoeff.search.results import page_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["results"])

Axis = Annotated[str | None, Query(pattern=r"^[A-Za-z_][\w./:@-]{0,79}$", description="Name of a measurement, or `trial`.")]


@router.get(
    "/pareto",
    response_model=Front,
    response_model_exclude_unset=True,
    responses={**NOT_MODIFIED, **described_problems(404, 422)},
)
def get_front(server: Server, job: OwnedJob, request: Request, response: Response) -> Any:
    """The trials on the front, by number, also while the search goes on, and the best trial within the limits."""
    if (same := unchanged(request, response, job)) is not None:
        return same
    standing = server.standings.of(job)
    trials = server.store.numbered(job.id, standing.front)
    return server.roots.hide(
        {
            "quality": standing.quality,
            "best": standing.best,
            "best_quality": standing.best_quality,
            "feasible": standing.feasible,
            "columns": columns_of(job)["columns"],
            "items": page_of(server.store, job, trials),
        }
    )


@router.get("/points", response_model=Points, responses={**NOT_MODIFIED, **described_problems(404, 422)})
def get_points(
    server: Server,
    job: OwnedJob,
    request: Request,
    response: Response,
    x: Axis = None,
    y: Axis = None,
    most: Annotated[int, Query(alias="max", ge=1, le=5000, description="Points of the picture.")] = 2000,
) -> Any:
    """Trials as points of a picture, by number: the front and the baselines whole, of the others evenly many over time.

    Without names, `x` is the cost that the job is judged at and `y` its quality. What is measured on held-out text is a value of the
    search trial.
    """
    if (same := unchanged(request, response, job)) is not None:
        return same
    columns = columns_of(job)
    x, y = x or columns["judged_cost"], y or columns["quality"]
    points = points_of(server.store, job, server.standings.of(job), x, y, most)
    return {"x": x, "y": y, "total": job.counts.trials, "items": [vars(point) for point in points]}


@router.post(
    "/resolve",
    response_model=ResolutionRow,
    responses=described_problems(404, 408, 409, 413, 415, 422),
    openapi_extra=documented_body(ResolveRequest),
)
async def resolve(server: Server, key: Reader, job: OwnedJob, asked: Annotated[ResolveRequest, Depends(body_of(ResolveRequest))]) -> Any:
    """The best configuration for a new budget, from what was measured; no model is loaded, unless workers are to measure more."""
    if not asked.measure:
        name = f"resolve {job.id} {job.events} {asked.limits}"
        return server.roots.hide(await server.backroom.ask(name, work.resolved, job.id, asked.limits, server.settings))
    await needs("jobs:write")(key)
    check_driven_here(job)
    name = f"measure {job.id} {asked.limits}"
    return server.roots.hide(await server.measuring.ask(name, work.resolved, job.id, asked.limits, server.settings, measure=True))
