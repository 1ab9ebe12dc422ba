"""What views show of a server, asked for through the typed client and given as plain data. Nothing here draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autoeff.client import Client
from autoeff.errors import AutoeffError, NotFound
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import SearchSpace

__all__ = ["Best", "Snapshot", "Terrain", "bests", "contents", "snapshot", "terrain", "trial_rows"]

_POINTS = 2000
"""Of a picture: as many as a browser moves without stumbling."""
_ASKED_AT_ONCE = 8


@dataclass(frozen=True)
class Snapshot:
    """A job as it stood at one moment.

    Attributes:
        job: Its facts (`JobDetail`).
        front: Its front, and its best trial (`Front`).
        best: The row of its best trial, which need not be on the front: it is chosen by the held-out text.
        points: Trials of the picture (`Points`): quality over the cost at which the job is judged.
        uniform: Labels of the baselines "this level everywhere" by trial.
        result: The end table, once there is one.
    """

    job: Any
    front: Any
    best: Any
    points: Any
    uniform: Mapping[int, str]
    result: Mapping[str, Any] | None

    @property
    def own(self) -> bool:
        """Whether the user's own code is searched, of whose measurements only directions are known."""
        return "text" not in self.job.preflight

    @property
    def method(self) -> str | None:
        """How values of the judged cost came about, where they are not exact: `predicted` or `estimated`."""
        title = str(self.job.columns.get(self.job.judged_cost, ""))
        return title.rpartition("(")[2].removesuffix(")") if title.endswith(")") else None

    @property
    def whole(self) -> list[Any]:
        """Points measured on the whole search text, which alone compare."""
        if self.own:
            return [point for point in self.points.items if None not in (point.x, point.y)]
        windows = self.job.preflight["text"]["search"]["windows"]
        return [point for point in self.points.items if point.windows == windows and None not in (point.x, point.y)]


@dataclass(frozen=True)
class Terrain:
    """What a job searches.

    Attributes:
        space: Its decisions.
        batch: Sequences that are decoded together.
        context: Tokens in the cache.
    """

    space: SearchSpace
    batch: int
    context: int

    @cached_property
    def costs(self) -> CostModel:
        """The cost measures of the space."""
        return CostModel(self.space, batch=self.batch, context=self.context)


@dataclass(frozen=True)
class Best:
    """The best of a job so far.

    Attributes:
        trial: Its number; None while nothing keeps the limits.
    """

    trial: int | None
    quality: str
    value: float | None
    feasible: bool


def snapshot(client: Client, job_id: str, before: Snapshot | None = None) -> Snapshot:
    """How a job stands now; where nothing has happened since `before`, one small request tells.

    Raises:
        AutoeffError: The server refuses, or is not reached.
    """
    before = before if before is not None and before.job.job == job_id else None
    job = client.job(job_id, None if before is None else before.job)
    if before is not None and job is before.job:
        return before
    result = None
    if job.state == "succeeded":
        with suppress(NotFound):  # of a search that ended before summaries were kept
            result = client.result(job_id)
    uniform = client.trial_page(job_id, origin="uniform", limit=100).items
    front = client.pareto(job_id)
    best = next((row for row in front.items if row.trial == front.best), None)
    return Snapshot(
        job=job,
        front=front,
        best=client.trial(job_id, front.best) if best is None and front.best is not None else best,
        points=client.points(job_id, most=_POINTS),
        uniform={row.trial: row.label or "uniform" for row in uniform if job.quality in row.measurements},
        result=result,
    )


def terrain(client: Client, job: Any) -> Terrain | None:
    """What a job searches; None where it is the user's own code, whose decisions have no layers and no costs.

    Raises:
        AutoeffError: The server refuses, or is not reached.
    """
    if "model" not in job.preflight:
        return None
    space = SearchSpace.from_json(client.space(job.job))
    return Terrain(space, job.spec["batch"], job.spec["context"] or job.preflight["model"]["context"])


def bests(client: Client, jobs: Sequence[Any]) -> dict[str, Best]:
    """The best of each of these jobs, asked for side by side; what the server does not answer is left out."""

    def best(job: Any) -> Best | None:
        try:
            front = client.pareto(job.job)
        except AutoeffError:
            return None
        return Best(front.best, front.quality, front.best_quality, front.feasible)

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        found = pool.map(best, jobs)
        return {job.job: one for job, one in zip(jobs, found, strict=True) if one is not None}


def trial_rows(client: Client, job_id: str, most: int) -> list[Any]:
    """The first `most` succeeded trials with their configurations."""
    rows: list[Any] = []
    cursor: str | None = None
    while len(rows) < most:
        page = client.trial_page(job_id, ["succeeded"], limit=min(500, most - len(rows)), cursor=cursor)
        rows += page.items
        cursor = page.next
        if cursor is None:
            break
    return rows


def contents(client: Client, artifact: Any) -> bytes:
    """The bytes of a file of a job, seen to be whole.

    Raises:
        AutoeffError: They did not come, or are not what the server has.
    """
    with TemporaryDirectory(prefix="autoeff-dashboard-") as folder:
        path = Path(folder) / "file"
        client.download(artifact, path)
        return path.read_bytes()
