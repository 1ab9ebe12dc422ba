"""Files that a job left: its report and its exports."""

from __future__ import annotations

from base64 import b64encode
from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse

from autoeff.api.context import Server
from autoeff.api.dependencies import OwnedJob
from autoeff.api.exports import REPORT
from autoeff.api.problems import ApiError, described_problems
from autoeff.api.schemas import ArtifactPage

__all__ = ["router"]

router = APIRouter(prefix="/v1/jobs/{job_id}/artifacts", tags=["artifacts"])

Name = Annotated[str, Path(max_length=120, description="As the list says.", examples=["report.html"])]


@router.get("", response_model=ArtifactPage, response_model_exclude_unset=True, responses=described_problems(404, 422))
def list_artifacts(server: Server, job: OwnedJob) -> Any:
    """The files of a job."""
    items = [one | {"href": f"/v1/jobs/{job.id}/artifacts/{one['name']}"} for one in server.exports.all(job)]
    return server.roots.hide({"items": items})


@router.get(
    "/{name}",
    response_class=FileResponse,
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **described_problems(404, 409, 422),
    },
)
async def get_artifact(server: Server, job: OwnedJob, name: Name) -> FileResponse:
    """A file, to be saved: never shown as a page of this server."""
    headers = {"Content-Security-Policy": "sandbox; default-src 'none'", "Cache-Control": "private, no-cache"}
    if name in REPORT:
        path, media_type = await server.exports.report(job, name), REPORT[name]
    else:
        facts, path = server.exports.archive(job.id, name)
        if facts["state"] == "building":
            raise ApiError(409, "building", f"{name} is being written; ask again", {"Retry-After": "2"})
        if facts["state"] == "failed":
            raise ApiError(409, "export-failed", str(facts["failure"]))
        media_type = facts["media_type"]
        headers["Repr-Digest"] = f"sha-256=:{b64encode(bytes.fromhex(facts['sha256'])).decode()}:"
    return FileResponse(path, filename=f"{job.id}-{name}", media_type=media_type, headers=headers)
