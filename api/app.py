"""The application: every route behind a key, every error a problem, one set of parts for all."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool

import autoeff
from autoeff.api.access import Caller, Doorkeeper, RateLimits, caller
from autoeff.api.backroom import Backroom
from autoeff.api.bodies import BodyLimit
from autoeff.api.context import Context
from autoeff.api.cursors import Cursors
from autoeff.api.exports import Exports
from autoeff.api.feed import Feed
from autoeff.api.metrics import Metrics, Observed, Sample
from autoeff.api.problems import ApiError, Problem, ProblemItem, described_problems, install
from autoeff.api.roots import Roots
from autoeff.api.routes import artifacts, datasets, events, hardware, health, jobs, kernel_latencies, keys, models, pareto, space, trials
from autoeff.api.schemas import Budgets, ExportRequest, KeyRequest, ResolveRequest
from autoeff.api.standings import Standings
from autoeff.errors import InputError
from autoeff.search.job import JobSpec
from autoeff.search.runs import write_file
from autoeff.search.settings import Settings
from autoeff.search.storage.idempotency import Replies
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.plant import Plant
from autoeff.search.storage.store import Store

__all__ = ["OPEN_ROUTES", "create_app", "openapi_document"]

OPEN_ROUTES = frozenset({"/livez", "/readyz"})
"""What answers without a key."""
_BODIES: tuple[type[BaseModel], ...] = (Budgets, ExportRequest, JobSpec, KeyRequest, ResolveRequest)
_DESCRIPTION = "Searches of transformer configurations: submitted, followed, steered and read. Errors are problems (RFC 9457)."


def create_app(settings: Settings, store: Store | None = None) -> FastAPI:
    """The API over a database.

    Args:
        settings: Of this machine.
        store: Open, and closed by the caller; without one the database of the settings is opened, and closed at the end.

    Raises:
        InputError: The database or the home folder cannot be used, or a folder of models or texts is not there.
    """
    opened = Store.open(settings.database) if store is None else store
    context = _context(settings, opened)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(context.exports.sweep)
        yield
        await context.feed.close()
        for room in (context.backroom, context.measuring, context.exporting):
            room.close()
        if store is None:
            opened.close()

    app = _routed(lifespan)
    app.state.context = context
    app.add_middleware(BodyLimit)
    build = app.build_middleware_stack
    # Around the framework's own outermost layer, which answers faults.
    app.build_middleware_stack = lambda: Observed(build(), context.metrics)  # type: ignore[method-assign]
    return app


def openapi_document() -> dict[str, Any]:
    """The contract (OpenAPI 3.1), which `api/openapi.json` holds."""
    return _document(_routed())


def _routed(lifespan: Any = None) -> FastAPI:
    app = FastAPI(
        title="autoeff",
        version=autoeff.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    install(app)
    app.include_router(health.router)

    async def only_known_parameters(request: Request) -> None:
        """Refuses a query parameter that the contract does not have: a filter that is misspelt would be no filter."""
        operation = _document(app)["paths"].get(request.scope["route"].path, {}).get(request.method.lower(), {})
        known = {found["name"] for found in operation.get("parameters", ()) if found["in"] == "query"}
        if unknown := sorted(set(request.query_params) - known):
            items = [ProblemItem(detail="is unknown here", parameter=name[:80]) for name in unknown[:20]]
            raise ApiError(422, "invalid-input", f"there is no query parameter {unknown[0][:80]!r} here", errors=items)

    guarded = APIRouter(
        dependencies=[Depends(caller), Depends(only_known_parameters)], responses=described_problems(401, 403, 422, 429, 500, 503)
    )
    for resource in (jobs, space, trials, pareto, events, artifacts, models, datasets, hardware, kernel_latencies, keys):
        guarded.include_router(resource.router)
    guarded.include_router(health.guarded)

    @guarded.get("/openapi.json", include_in_schema=False)
    def contract(key: Caller) -> JSONResponse:
        return JSONResponse(_document(app))

    app.include_router(guarded)
    return app


def _context(settings: Settings, store: Store) -> Context:
    ring, roots = KeyRing(store.database), Roots(settings.model_roots, settings.data_roots, hub=settings.hub, private=(settings.home,))
    feed, backroom, exporting = Feed(store), Backroom(), Backroom()
    return Context(
        settings=settings,
        store=store,
        ring=ring,
        replies=Replies(store.database),
        roots=roots,
        cursors=Cursors(_secret(settings)),
        rates=RateLimits(settings.calls_per_minute),
        doorkeeper=Doorkeeper(ring),
        feed=feed,
        standings=Standings(store, settings.job_folder),
        exports=Exports(settings, backroom, exporting),
        backroom=backroom,
        measuring=Backroom(),
        exporting=exporting,
        metrics=Metrics(lambda: _plant(store)),
    )


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, bodies = models_json_schema(
            [(model, "validation") for model in _BODIES] + [(Problem, "serialization")], ref_template="#/components/schemas/{model}"
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(bodies["$defs"])
        for name in ("HTTPValidationError", "ValidationError"):  # the framework's own, which nothing here answers
            schemas.pop(name, None)
        document["components"]["schemas"] = dict(sorted(schemas.items()))
        app.openapi_schema = document
    return app.openapi_schema


def _secret(settings: Settings) -> str:
    """What signs cursors: the setting, or one that the first server on this machine drew."""
    if settings.secret is not None:
        return settings.secret
    path = settings.home / "secret"
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, secrets.token_hex(32).encode())
            path.chmod(0o600)
        return path.read_text().strip()
    except OSError as error:
        raise InputError(f"cannot keep a secret in {path}: {error.strerror or error}; set AUTOEFF_HOME or AUTOEFF_SECRET") from None


def _plant(store: Store) -> Iterator[Sample]:
    """What the tables say."""
    plant = Plant(store.database)
    for state, number in plant.jobs().items():
        yield "autoeff_jobs", "Jobs by state.", {"state": str(state)}, float(number)
    for queue, (waiting, oldest_s) in plant.queues().items():
        yield "autoeff_queue_evaluations", "Evaluations that wait for a worker.", {"queue": queue}, float(waiting)
        yield "autoeff_queue_oldest_seconds", "Age of the oldest that waits.", {"queue": queue}, oldest_s
    workers = store.workers()
    yield "autoeff_workers", "Workers that are alive.", {}, float(sum(worker.alive for worker in workers))
    yield "autoeff_workers_busy", "Workers that evaluate.", {}, float(sum(worker.evaluation_id is not None for worker in workers))
