"""Every answer that is an error: `application/problem+json` (RFC 9457), whoever raised it.

`type` is stable and names the kind; `detail` is the one line that the command would print; `errors` points into the request;
`trace_id` stands in the server's log too. No answer holds a traceback, SQL, or a path that the configured roots do not show.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from autoeff.api.context import server_of
from autoeff.errors import AutoeffError, CandidateError, Conflict, InputError, LeaseLost, NotFound, RunnerLost, Stale, StorageError

__all__ = [
    "MEDIA_TYPE",
    "PROBLEMS",
    "TYPE",
    "ApiError",
    "Problem",
    "ProblemItem",
    "answer",
    "described_problems",
    "install",
    "problem_response",
]

MEDIA_TYPE = "application/problem+json"
TYPE = "urn:autoeff:problem:"
_LOG = logging.getLogger("autoeff.api")


class ProblemItem(BaseModel):
    """What is wrong at one place of the request."""

    detail: str
    pointer: str | None = Field(default=None, description="JSON pointer into the body, as a fragment.")
    parameter: str | None = Field(default=None, description="Name of a query or path parameter, or of a header.")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Stable name of the kind of problem.")
    title: str
    status: int
    detail: str
    trace_id: str = Field(description="Stands in the server's log beside the cause.")
    errors: list[ProblemItem] = Field(default_factory=list)


class ApiError(AutoeffError):
    """A refusal that HTTP knows and the command line does not.

    Args:
        status: Of the answer.
        problem: Its kind, the end of `type`.
        message: One line.
        headers: Sent with the answer.
        errors: Places of the request that are wrong.
    """

    def __init__(
        self, status: int, problem: str, message: str, headers: Mapping[str, str] | None = None, errors: Sequence[ProblemItem] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.problem, self.headers, self.errors = status, problem, dict(headers or {}), tuple(errors)


PROBLEMS: Mapping[int, str] = {
    400: "bad-request",
    401: "unauthorized",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    406: "not-acceptable",
    408: "timeout",
    409: "conflict",
    412: "precondition-failed",
    413: "too-large",
    415: "unsupported-media-type",
    422: "invalid-input",
    428: "precondition-required",
    429: "too-many-requests",
    500: "internal",
    503: "unavailable",
}
"""The kind that an answer of this status is when nothing says more."""

_STATUS: Sequence[tuple[type[AutoeffError], int]] = (
    (NotFound, 404),
    (Stale, 412),
    (Conflict, 409),
    (InputError, 422),
    (CandidateError, 422),
    (LeaseLost, 409),
    (StorageError, 503),
    (RunnerLost, 503),
    (AutoeffError, 503),
)
_HIDDEN = "the server cannot do this now; its log says why under this trace_id"


def problem_response(
    request: Request,
    status: int,
    detail: str,
    *,
    problem: str | None = None,
    headers: Mapping[str, str] | None = None,
    errors: Sequence[ProblemItem] = (),
) -> JSONResponse:
    """The answer for a problem."""
    problem = problem or PROBLEMS.get(status, "failure")
    body = Problem(
        type=TYPE + problem,
        title=problem.replace("-", " "),
        status=status,
        detail=detail,
        trace_id=trace_id(request),
        errors=list(errors),
    )
    return JSONResponse(body.model_dump(exclude_none=True), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def answer(request: Request, error: Exception) -> Response:
    """The answer for an error of autoeff; what is not the caller's business goes to the log alone."""
    hide = server_of(request).roots.hide
    if isinstance(error, ApiError):
        return problem_response(request, error.status, hide(str(error)), problem=error.problem, headers=error.headers, errors=error.errors)
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    problem = getattr(error, "problem", None)
    if status == 503:  # a full disk, a database that does not answer: its message names paths
        _LOG.error("%s %s %s: %s", trace_id(request), request.method, request.url.path, error)
        return problem_response(request, status, _HIDDEN, problem=None, headers={"Retry-After": "5"})
    return problem_response(request, status, hide(" ".join(str(error).split())), problem=problem)


def described_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that may answer with problems of these statuses."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def trace_id(request: Request) -> str:
    """Of this request; the outermost layer sets it."""
    return str(request.scope.get("autoeff.trace_id", "-"))


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem."""

    async def on_error(request: Request, error: Exception) -> Response:
        return answer(request, error)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        items = [_item(found) for found in error.errors()]
        return problem_response(request, 422, _first(items), errors=items)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail, headers = str(error.detail), dict(error.headers or {})
        if error.status_code == 404:
            detail = f"there is nothing at {request.url.path[:200]}"
        elif error.status_code == 405:
            headers["Allow"] = allowed = ", ".join(_methods(app, request.url.path))
            detail = f"{request.method[:20]} is not possible here; possible: {allowed}"
        return problem_response(request, error.status_code, detail, headers=headers)

    async def on_fault(request: Request, error: Exception) -> Response:
        # Starlette raises it again once this is sent, and the server logs the traceback; this line ties the two together.
        _LOG.error("%s %s %s: %s", trace_id(request), request.method, request.url.path, type(error).__name__)
        return problem_response(request, 500, "this is a fault of autoeff; the server's log has its traceback under this trace_id")

    app.add_exception_handler(AutoeffError, on_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_fault)


def _methods(app: FastAPI, path: str) -> list[str]:
    """Of every route of this path, or where one is exactly that, of those that are; the framework names those of the first alone."""
    found = [context for context in iter_route_contexts(app.routes) if context.path and compile_path(context.path)[0].match(path)]
    found = [context for context in found if context.path == path] or found
    return sorted({method for context in found for method in context.methods or ()})


def _item(found: Mapping[str, Any]) -> ProblemItem:
    place, *path = found["loc"]
    message = " ".join(str(found["msg"]).split())
    if place == "body":
        return ProblemItem(detail=message, pointer="#" + "".join(f"/{_escaped(part)}" for part in path))
    return ProblemItem(detail=message, parameter=".".join(map(str, path)))


def _escaped(part: object) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def _first(items: Sequence[ProblemItem]) -> str:
    if not items:
        return "the request is not valid"
    where = items[0].parameter or items[0].pointer or "request"
    return f"{where}: {items[0].detail}"
