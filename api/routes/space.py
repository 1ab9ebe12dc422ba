"""What a job searches: its decisions, and what each level costs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from autoeff.api.context import Server
from autoeff.api.dependencies import NOT_MODIFIED, OwnedJob, unchanged
from autoeff.api.problems import described_problems

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])


@router.get(
    "/space",
    response_model=dict[str, Any],
    responses={**NOT_MODIFIED, **described_problems(404, 422)},
)
def get_space(server: Server, job: OwnedJob, request: Request, response: Response) -> Any:
    """The search space as stored: decisions by block, their levels, and the exact change of cost that each level makes."""
    return unchanged(request, response, job) or server.roots.hide(dict(job.space))
