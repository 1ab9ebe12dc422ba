"""Runs a search from its description to its report, in this process: the embedded way that needs no server."""

from __future__ import annotations

import datetime
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from autoeff.errors import ExitCode, InputError
from autoeff.search.coordinator import Coordinator, Progress
from autoeff.search.crew import Away
from autoeff.search.exporter import export_trial
from autoeff.search.job import JobSpec
from autoeff.search.model import Plan, plan
from autoeff.search.own_job import Choice, refuse_own
from autoeff.search.planned import PlannedJob
from autoeff.search.report import write_report
from autoeff.search.results import rows_of
from autoeff.search.runner_process import prestart
from autoeff.search.runs import new_run, open_run
from autoeff.search.samplers.problem import Candidate
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Job, Trial
from autoeff.search.storage.store import Store
from autoeff.search.subject import Subject
from autoeff.spaces.measurements import Split

__all__ = ["Plan", "Progress", "Result", "adding", "drive", "export", "plan", "resume", "run_search", "start"]

Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Result:
    """A finished search.

    Attributes:
        folder: The run directory.
        exit_code: 0 with a feasible configuration, 3 without.
        summary: The end table and what the report shows, as plain data.
        rows: The public rows of every trial.
    """

    job_id: str
    folder: Path
    exit_code: int
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def found(self) -> Mapping[str, Any] | None:
        """The row of the configuration found at the first operating point; None if nothing was feasible."""
        return next((row for row in self.rows if row["trial"] == self.summary["found"]), None)

    @property
    def front(self) -> list[Mapping[str, Any]]:
        """The rows on the Pareto front."""
        return [row for row in self.rows if row["trial"] in self.summary["front"]]


def start(spec: JobSpec, out: Path, settings: Settings, watch: Watch = lambda progress: None) -> Result:
    """Runs a new search into the folder `out`, which must not exist.

    Raises:
        InputError: As `plan`; also a queue, and an existing or unwritable `out`.
    """
    if spec.queue is not None:
        raise InputError(f"queue {spec.queue!r} names workers of a server; submit the job to one, or leave it out")
    prestart(spec.device)
    planned = plan(spec, settings)
    with Store.open(settings.database) as store:
        job_id = uuid.uuid4().hex[:12]
        with new_run(out, job_id, settings.database) as folder:
            store.create_job(job_id, spec.model_dump(mode="json"), planned.preflight, planned.space.to_json(), planned.digest)
        return drive(store, job_id, folder, planned, settings, watch)


def resume(run: str | Path, settings: Settings, watch: Watch = lambda progress: None, *, retry_failed: bool = False) -> Result:
    """Goes on with a search that was stopped or killed; a finished one only writes its report again.

    Args:
        run: Its directory, or the id of its job.
        settings: Of this machine.
        watch: Hears of progress.
        retry_failed: Whether trials that failed are tried again; a finished search refuses that.

    Raises:
        InputError: No such run, another process drives it, or model, text or machine are no longer the same.
    """
    store, job_id, folder = open_run(run, settings)
    with store:
        job = store.job(job_id)
        planned, folder = _planned_again(job, run, folder, settings)
        if retry_failed and job.coordinator is None:
            store.retry_failed(job_id)
        return drive(store, job_id, folder, planned, settings, watch)


@contextmanager
def adding(
    store: Store, job: Job, run: str | Path, folder: Path | None, settings: Settings, watch: Watch
) -> Iterator[Callable[[Candidate, Split], Trial]]:
    """Yields what measures a further configuration with the model of a finished job and stores it as a trial of that job.

    Of a job that was submitted, the workers of its queue measure it.

    Raises:
        InputError: As `resume`; also a job that has not ended, or whose queue has no worker.
    """
    if job.queue is None:
        planned, folder = _planned_again(job, run, folder, settings)
        coordinator = Coordinator(store, job.id, planned, folder, settings, watch)
    else:
        if not any(worker.alive and job.queue in worker.queues for worker in store.workers()):
            raise InputError(f"no worker of queue {job.queue!r} is there to measure; start one: autoeff worker --queues {job.queue}")
        stored = PlannedJob.stored(job)  # whose space is that of the trials
        if plan(stored.spec, settings, job.queue).digest != job.setup_digest:
            raise InputError("its model, its text or this version is no longer what it was when it was submitted; submit it again")
        crew = Away(store, job.queue, threading.Event(), threading.Event())
        coordinator = Coordinator(store, job.id, stored, Path(), settings, watch, crew)
    with coordinator.adding() as evaluate:
        yield evaluate


@overload
def run_search(
    model: str | Path,
    data: str | Path | Mapping[str, Any] | None = None,
    *,
    eval_data: str | Path | Mapping[str, Any] | None = None,
    knobs: Iterable[str] | Mapping[str, Mapping[str, Any]] = ("bits",),
    limits: Iterable[str] = (),
    objectives: Iterable[str] = ("quality", "weight_bytes"),
    trials: int = 300,
    timeout: float | None = None,
    seed: int = 0,
    sampler: str = "additive",
    out: str | Path | None = None,
    watch: Watch = ...,
    **fields: Any,
) -> Result: ...


@overload
def run_search(
    *,
    build: Callable[[dict[str, Any]], Any],
    space: Mapping[str, Choice],
    metrics: Iterable[Callable[[Any], Any]] | Mapping[str, Callable[[Any], Any]],
    objectives: Iterable[str],
    limits: Iterable[str] = (),
    trials: int = 100,
    timeout: float | None = None,
    seed: int = 0,
    sampler: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    watch: Watch = ...,
) -> Result: ...


def run_search(*args: Any, **kwargs: Any) -> Result:  # noqa: D417  (the two forms have arguments of their own)
    """Searches a model from disk, or code of your own, and returns what was found.

    A model, layer by layer: `run_search("demo", knobs=["bits", "skip"], limits=["avg_bits<=3.5"])`.

    Args:
        model: Directory, hub id or bundled name.
        data: Search text; may be left out for bundled models.
        eval_data: Held-out text; default is the last fifth of `data`.
        knobs: Names, or settings by name.
        limits: Such as `weight_bytes<=0.30x`.
        objectives: The first is the quality.
        trials: Budget in full-token equivalents.
        timeout: Wall-clock budget in seconds.
        seed: Of everything random.
        sampler: Who proposes.
        out: New folder for the run; default `runs/<model>-<time>`.
        watch: Called with every progress.
        **fields: Any other `JobSpec` field: `space`, `batch`, `context`, `device`.

    Code of your own: `run_search(build=build, space={"depth": choice(2, 4, 6)}, metrics=[accuracy, parameters],
    objectives=["-accuracy", "parameters"], limits=["parameters<=1e6"])`. In this form:

    Args:
        build: Makes a candidate, such as a trained module, of a configuration: a dict with a value for every name of `space`.
        space: A `choice` for each decision. The first values together are the reference configuration, which is always evaluated,
            as are `min(32, N/5)` random ones.
        metrics: Functions that take the candidate and return a number, known by the function's name, or a dict of numbers, known by
            its keys. They are called in order, on the same candidate.
        objectives: Names of metrics, each minimised; `-accuracy` minimises minus accuracy, and so asks for the largest. The first
            decides which configuration is found.
        limits: Such as `parameters<=1e6` or `accuracy>=0.9`. They are checked when a candidate has been measured; samplers learn from it.
        trials: Budget in evaluations. Equal configurations are evaluated once, and the search ends when all are known.
        timeout: Wall-clock budget in seconds, after which nothing is proposed; baselines are measured all the same.
            AUTOEFF_EVALUATION_TIMEOUT_S limits one candidate (default 600), and
            AUTOEFF_MEMORY_CAP_BYTES its memory.
        seed: Of the search, and of the generators of Python, numpy and torch at the start of each candidate.
        sampler: Default `tpe` for one objective, `nsga2` for more; also `gp` and `random`.
        out: New folder for the run; default `runs/<build>-<time>`.
        resume: Goes on with the run in `out`. Functions are not stored, so the same call must be made again: measured candidates are
            answered from the database, and the sequence is that of an undisturbed run.
        watch: Called with every progress.

    A candidate whose functions raise, crash, hang or give no finite number is a recorded failure with its traceback, and the search
    goes on. Each is built and measured in a process forked from this one, on Linux and macOS, so closures and notebooks work, and what a
    candidate changes in memory is gone with it. Torch runs on one thread there, since threads do not survive a fork. CUDA does
    not either: it can be used inside `build` and the metrics as long as this process has not used it before.

    Raises:
        InputError: Something passed is wrong.
    """
    if "build" in kwargs and not args:
        from autoeff.search.own import search_own  # it stands above this module

        return search_own(**kwargs)
    return _search_model(*args, **kwargs)


def _search_model(
    model: str | Path,
    data: str | Path | Mapping[str, Any] | None = None,
    *,
    eval_data: str | Path | Mapping[str, Any] | None = None,
    knobs: Iterable[str] | Mapping[str, Mapping[str, Any]] = ("bits",),
    limits: Iterable[str] = (),
    objectives: Iterable[str] = ("quality", "weight_bytes"),
    trials: int = 300,
    timeout: float | None = None,
    seed: int = 0,
    sampler: str = "additive",
    out: str | Path | None = None,
    watch: Watch = lambda progress: None,
    **fields: Any,
) -> Result:
    named = {"data": data, "eval_data": eval_data}
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in named.items() if value is not None}
    spec = JobSpec.parse(
        {
            "model": str(model), **texts, "knobs": knobs if isinstance(knobs, Mapping) else list(knobs), "limits": list(limits),
            "objectives": list(objectives), "budget": {"trials": trials, "seconds": timeout}, "seed": seed, "sampler": sampler, **fields,
        }
    )  # fmt: skip
    return start(spec, Path(out) if out is not None else default_folder(str(model)), Settings.read(), watch)


def default_folder(model: str) -> Path:
    """`runs/<model>-<time>`."""
    return Path("runs") / f"{Path(model).name or 'model'}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def export(run: str | Path, trial: int, folder: Path, format_name: str, settings: Settings) -> dict[str, Any]:
    """Writes a trial's configuration, measures it again in a fresh process and returns both figures.

    Raises:
        InputError: No such run, trial or format, or an existing folder.
        AutoeffError: What was exported is not what was searched.
    """
    store, job_id, _ = open_run(run, settings)
    with store:
        job = store.job(job_id)
        refuse_own(job, "of which nothing can be exported; build the configuration that `autoeff show` prints")
        setup = JobSpec.parse(job.spec).setup(settings.bank)
        return export_trial(job, store.trial(job_id, trial), setup, settings, folder, format_name).to_json()


def drive(store: Store, job_id: str, folder: Path, subject: Subject, settings: Settings, watch: Watch) -> Result:
    """Searches a stored job to its end, in this process, and writes its report.

    Raises:
        AutoeffError: Something outside the candidates failed; the job can be resumed.
    """
    summary = Coordinator(store, job_id, subject, folder, settings, watch).run()
    job = store.job(job_id)
    rows = rows_of(store, job_id)
    write_report(folder, job, rows, summary)
    exit_code = ExitCode.FEASIBLE if summary["state"] == "feasible" else ExitCode.INFEASIBLE
    return Result(job_id, folder, exit_code, summary, rows)


def _planned_again(job: Job, run: str | Path, folder: Path | None, settings: Settings) -> tuple[Plan, Path]:
    """The plan of a stored job, found to be what it was, and its run directory."""
    if folder is None:
        raise InputError(f"job {job.id} has no run directory here; name the directory that its search wrote to")
    refuse_own(job, f"whose functions are not stored; call autoeff.run_search(build=…, …, out={str(run)!r}, resume=True) as it was started")
    planned = plan(JobSpec.parse(job.spec), settings)
    if planned.digest != job.setup_digest or _times(planned.preflight) != _times(job.preflight):
        raise InputError(f"run {run} cannot go on: {_changed(job.preflight, planned.preflight)}")
    return planned, folder


def _times(preflight: Mapping[str, Any]) -> str | None:
    """The digest of the times that are costs."""
    found = preflight.get("latency")
    return None if found is None else str(found["digest"])


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is no longer as it was at the start of a run, of all that its values depend on."""
    for what, (old, new) in {
        "the model's files": [p["model"]["digest"] for p in (before, now)],
        "the search text": [p["text"]["search"]["digest"] for p in (before, now)],
        "the held-out text": [p["text"]["held_out"]["digest"] for p in (before, now)],
        "the hardware": [p["hardware"] for p in (before, now)],
        "torch": [p["torch"] for p in (before, now)],
        "the latency table": [_times(p) for p in (before, now)],
    }.items():
        if old != new:
            remedy = f"; set OMP_NUM_THREADS={old[5:]}" if old[:5] == new[:5] == "cpu x" else ""
            return f"{what} changed from {old} to {new}{remedy}"
    return "this version of autoeff evaluates otherwise; use the one that started it"
