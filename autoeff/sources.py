"""Where the verbs that read get what they print: the database of this machine, or a server (`--server`). Both give the same data."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autoeff.errors import AutoeffError, ExitCode, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from autoeff.api.schemas import Front, JobDetail
    from autoeff.client import Client
    from autoeff.search.compare import Comparison
    from autoeff.search.coordinator import Progress
    from autoeff.search.job import JobSpec
    from autoeff.search.resolve import Resolution
    from autoeff.search.runs import Run

__all__ = ["Finished", "Listing", "Local", "Remote", "Shown", "Source", "opened"]

Row = Mapping[str, Any]
_LOOK_S = 1.0  # between looks at a job while its events come
_FETCHED = ("front.png", "report.html")


@dataclass(frozen=True)
class Listing:
    """Trials, and the measurements worth a column, with what to write above it."""

    rows: Sequence[Row]
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Shown:
    """One trial.

    Attributes:
        logs: Of its attempts; None where one left none.
    """

    row: Row
    logs: Sequence[str | None]


class _Attempt(Protocol):
    @property
    def accepted(self) -> bool: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...
    @property
    def log(self) -> str | None: ...


def shown(row: Row, attempts: Sequence[_Attempt]) -> Shown:
    """A trial with the logs of its attempts, and with what the worker noted in the one that counts, if it did."""
    facts = next((dict(attempt.facts) for attempt in attempts if attempt.accepted), {})
    return Shown({**row, **({"facts": facts} if facts else {})}, [attempt.log for attempt in attempts])


@dataclass(frozen=True)
class Finished:
    """A search that a server has ended.

    Attributes:
        summary: As the report has it.
        columns: As `search.facts.columns_of`.
    """

    exit_code: int
    summary: Row
    columns: Row


class Source(Protocol):
    """What the verbs ask for. RUN is a run directory or a job id, TRIAL a number or `best`."""

    def jobs(self) -> list[Row]:
        """Every job, the newest first."""

    def status(self, run: str) -> Row:
        """Where a job stands."""

    def pause(self, run: str, *, at_once: bool) -> None:
        """Has a search propose nothing more; `at_once` takes from workers what they are at."""

    def cancel(self, run: str) -> None:
        """Ends a search for good."""

    def change_budget(self, run: str, trials: int | None, seconds: float | None) -> None:
        """Replaces what is not None."""

    def trials(self, run: str) -> Listing:
        """Every trial."""

    def front(self, run: str) -> Listing:
        """The trials on the front."""

    def trial(self, run: str, trial: str) -> Shown:
        """One trial."""

    def feasible(self, run: str) -> bool:
        """Whether the best trial keeps the limits."""

    def resolve(self, run: str, limits: Sequence[str], *, measure: bool, watch: Callable[[Progress], None]) -> Resolution:
        """The answer for a new budget."""

    def compare(self, runs: Sequence[str]) -> Comparison:
        """Runs side by side."""

    def export(self, run: str, trial: str, folder: Path, format_name: str) -> Row:
        """Writes a trial out."""


class Local:
    """The database of this machine."""

    def jobs(self) -> list[Row]:
        from autoeff.search.facts import job_facts
        from autoeff.search.settings import Settings
        from autoeff.search.storage.store import Store

        with Store.open(Settings.read().database) as store:
            jobs = page = store.jobs()
            while page:
                page = store.jobs(before=page[-1].id)
                jobs += page
        return [job_facts(job) for job in jobs]

    def status(self, run: str) -> Row:
        from autoeff.search.facts import job_facts, status_facts
        from autoeff.search.standing import standing_of

        with opened(run) as found:
            job = found.store.job(found.job_id)
            counts, folder = job.counts, None if found.folder is None else str(found.folder)
            standing = standing_of(found.store, job)
            return status_facts(job_facts(job), folder, standing, counts.succeeded, counts.failed + counts.quarantined)

    def pause(self, run: str, *, at_once: bool) -> None:
        with opened(run) as found:
            found.store.pause(found.job_id, at_once=at_once)

    def cancel(self, run: str) -> None:
        with opened(run) as found:
            found.store.cancel(found.job_id)

    def change_budget(self, run: str, trials: int | None, seconds: float | None) -> None:
        changed = {name: value for name, value in (("trials", trials), ("seconds", seconds)) if value is not None}
        with opened(run) as found:
            found.store.change_budget(found.job_id, changed, found.store.job(found.job_id).version)

    def trials(self, run: str) -> Listing:
        from autoeff.search.facts import columns_of
        from autoeff.search.results import rows_of

        with opened(run) as found:
            columns = columns_of(found.store.job(found.job_id))
            return Listing(rows_of(found.store, found.job_id), _columns(columns["columns"], columns["quality"]))

    def front(self, run: str) -> Listing:
        from autoeff.search.standing import standing_of

        with opened(run) as found:
            front = standing_of(found.store, found.store.job(found.job_id)).front
        listing = self.trials(run)
        return Listing([row for row in listing.rows if row["trial"] in front], listing.columns)

    def trial(self, run: str, trial: str) -> Shown:
        from autoeff.search.results import rows_of

        with opened(run) as found:
            record = found.store.trial(found.job_id, self._number(found, trial))
            row = next(row for row in rows_of(found.store, found.job_id) if row["trial"] == record.number)
            return shown(row, found.store.attempts(*record.evaluations))

    def feasible(self, run: str) -> bool:
        from autoeff.search.standing import standing_of

        with opened(run) as found:
            return standing_of(found.store, found.store.job(found.job_id)).feasible

    def resolve(self, run: str, limits: Sequence[str], *, measure: bool, watch: Callable[[Progress], None]) -> Resolution:
        from autoeff.search.resolve import resolve
        from autoeff.search.settings import Settings

        return resolve(run, limits, Settings.read(), measure=measure, watch=watch)

    def compare(self, runs: Sequence[str]) -> Comparison:
        from autoeff.search.compare import compare
        from autoeff.search.settings import Settings

        return compare(runs, Settings.read())

    def export(self, run: str, trial: str, folder: Path, format_name: str) -> Row:
        from autoeff.search.run import export
        from autoeff.search.settings import Settings

        with opened(run) as found:
            number = self._number(found, trial)
        return export(run, number, folder, format_name, Settings.read())

    @staticmethod
    def _number(found: Run, trial: str) -> int:
        from autoeff.search.standing import standing_of

        if trial != "best":
            return _decimal(trial)
        job = found.store.job(found.job_id)
        _check_single(job.id, job.spec)
        return _there(job.id, standing_of(found.store, job).best)


class Remote:
    """A server.

    Args:
        client: Speaks to it.
    """

    def __init__(self, client: Client) -> None:
        self.client = client

    def plan(self, spec: JobSpec) -> Row:
        """What is known of a job before any weight is loaded."""
        facts: Row = self.client.validate(spec).model_dump(mode="json")
        return facts

    def submit(self, spec: JobSpec, folder: Path) -> str:
        """Submits a search and makes its run directory; returns the job's id."""
        from autoeff.search.runs import FILE, FORMAT, write_file

        job_id = self.client.submit(spec).job
        try:
            folder.mkdir(parents=True)
            write_file(
                folder / FILE, (json.dumps({"format": FORMAT, "job": job_id, "server": self.client.server}, indent=1) + "\n").encode()
            )
        except OSError as error:
            raise InputError(
                f"cannot make the run directory {folder}: {error.strerror or error}; the search runs as job {job_id}"
            ) from None
        return job_id

    def resume(self, run: str, *, retry_failed: bool = False) -> str:
        """Has a paused or failed job go on, and its failed trials tried again where that is asked for; returns its id."""
        job_id = self.job(run)
        if retry_failed:
            self.client.retry_failed(job_id)
        if self.client.job(job_id).state in ("paused", "failed"):
            self.client.resume(job_id)
        return job_id

    def folder(self, run: str) -> Path:
        """Where what a job leaves is put."""
        return Path(run) if Path(run).is_dir() else Path("runs") / run

    def follow(self, job_id: str, folder: Path, watch: Callable[[Progress], None]) -> Finished:
        """Watches a job to its end and fetches its report.

        Raises:
            AutoeffError: It failed or was cancelled.
        """
        started, told, phase = time.monotonic(), 0.0, "loading"
        for event in self.client.events(job_id):
            phase = {"job.phase": event.body.get("phase", phase), "end": "done"}.get(event.kind, phase)
            if event.kind in ("job.phase", "end") or time.monotonic() - told > _LOOK_S:
                watch(_progress(self.client.job(job_id), self.client.pareto(job_id), phase, time.monotonic() - started))
                told = time.monotonic()
        job = self.client.job(job_id)
        if job.state != "succeeded":
            raise AutoeffError(job.error or f"job {job_id} was {job.state}")
        folder.mkdir(parents=True, exist_ok=True)
        for artifact in self.client.artifacts(job_id):
            if artifact.name in _FETCHED:
                self.client.download(artifact, folder / artifact.name)
        summary = self.client.result(job_id)
        exit_code = ExitCode.FEASIBLE if summary["state"] == "feasible" else ExitCode.INFEASIBLE
        return Finished(exit_code, summary, {"columns": job.columns, "quality": job.quality, "judged_cost": job.judged_cost})

    def jobs(self) -> list[Row]:
        return [job.model_dump(mode="json") for job in self.client.jobs()]

    def status(self, run: str) -> Row:
        from autoeff.api.schemas import JobSummary
        from autoeff.search.facts import status_facts
        from autoeff.search.standing import Standing

        job = self.client.job(self.job(run))
        front = self.client.pareto(job.job)
        standing = Standing(front.quality, tuple(row.trial for row in front.items), front.best, front.best_quality, front.feasible)
        facts = {name: value for name, value in job.model_dump(mode="json").items() if name in JobSummary.model_fields}
        folder = str(Path(run).absolute()) if Path(run).is_dir() else None
        return status_facts(facts, folder, standing, job.succeeded, job.failed)

    def pause(self, run: str, *, at_once: bool) -> None:
        self.client.pause(self.job(run), at_once=at_once)

    def cancel(self, run: str) -> None:
        self.client.cancel(self.job(run))

    def change_budget(self, run: str, trials: int | None, seconds: float | None) -> None:
        self.client.change_budget(self.client.job(self.job(run)), trials=trials, seconds=seconds)

    def trials(self, run: str) -> Listing:
        job = self.client.job(self.job(run))
        return Listing([_row(trial) for trial in self.client.trials(job.job)], _columns(job.columns, job.quality))

    def front(self, run: str) -> Listing:
        front = self.client.pareto(self.job(run))
        return Listing([_row(trial) for trial in front.items], _columns(front.columns, front.quality))

    def trial(self, run: str, trial: str) -> Shown:
        job_id = self.job(run)
        found = self.client.trial(job_id, self._number(job_id, trial))
        row = _row(found)
        del row["attempts"]
        return shown(row, found.attempts)

    def feasible(self, run: str) -> bool:
        return self.client.pareto(self.job(run)).feasible

    def resolve(self, run: str, limits: Sequence[str], *, measure: bool, watch: Callable[[Progress], None]) -> Resolution:
        from autoeff.search.resolve import Resolution

        if not limits:
            raise InputError("name the new budget with --limit, for example --limit 'linear_bytes<=0.22x'")
        found = self.client.resolve(self.job(run), limits, measure=measure)
        return Resolution(
            found.job, found.quality, tuple(found.limits), found.answer, found.predicted, found.measured, tuple(found.proposals)
        )

    def compare(self, runs: Sequence[str]) -> Comparison:
        from autoeff.search.compare import Comparison

        if len(runs) < 2:
            raise InputError("name at least two runs to compare")
        return Comparison(**self.client.compare([self.job(run) for run in runs]).model_dump())

    def export(self, run: str, trial: str, folder: Path, format_name: str) -> Row:
        job_id = self.job(run)
        artifact = self.client.export(job_id, self._number(job_id, trial), folder, format_name)
        return {**(artifact.facts or {}), "folder": str(folder)}

    def job(self, run: str) -> str:
        """The job that RUN stands for: an id, or what the run directory of a search on a server says."""
        from autoeff.search.runs import FILE

        file = Path(run) / FILE
        if not file.is_file():
            if os.sep in run:
                raise InputError(f"{run!r} is no run directory; name one, or a job id that `autoeff ls` shows")
            return run
        try:
            found = json.loads(file.read_bytes())
            job, server = str(found["job"]), found.get("server")
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{file} is damaged; use the job id instead, which `autoeff ls` shows") from None
        if server != self.client.server:
            raise InputError(
                f"{run} is a run of {server or 'this machine'}, not of {self.client.server}; leave --server out or name its own"
            )
        return job

    def _number(self, job_id: str, trial: str) -> int:
        if trial != "best":
            return _decimal(trial)
        _check_single(job_id, self.client.job(job_id).spec)
        return _there(job_id, self.client.pareto(job_id).best)


@contextmanager
def opened(ref: str) -> Iterator[Run]:
    """The run called `ref`, of this machine."""
    from autoeff.search.runs import open_run
    from autoeff.search.settings import Settings

    run = open_run(ref, Settings.read())
    with run.store:
        yield run


def _progress(job: JobDetail, front: Front, phase: str, seconds: float) -> Progress:
    """What can be said from outside."""
    from autoeff.search.coordinator import Progress

    return Progress(
        phase=phase,
        done=job.trials - job.open,
        total=0,
        used=job.used,
        budget=float(job.budget),
        best=front.best_quality,
        quality=front.quality,
        front=len(front.items),
        failures=job.failed,
        seconds=seconds,
        eta_s=None,
    )


def _columns(costs: Mapping[str, str], quality: str) -> dict[str, str]:
    return {**costs, quality: quality}


def _row(trial: Any) -> dict[str, Any]:
    row: dict[str, Any] = trial.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return row


def _decimal(trial: str) -> int:
    if not (trial.isascii() and trial.isdecimal()):
        raise InputError(f"no trial {trial!r}: give a number, counted from 0, or best")
    return int(trial)


def _check_single(job_id: str, spec: Row) -> None:
    if not spec["limits"] and len(spec["objectives"]) > 1:
        raise InputError(f"job {job_id} has no limits, so no single best trial; `autoeff pareto` lists the front to choose from")


def _there(job_id: str, number: int | None) -> int:
    if number is None:
        raise InputError(f"job {job_id} has no feasible trial with a value (yet); `autoeff ls` lists its trials")
    return number
