"""Runs a search from its description to its report, in this process: the embedded way that needs no server."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeff.errors import ExitCode, InputError
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.search.coordinator import Coordinator, Progress
from autoeff.search.exporter import export_trial
from autoeff.search.guests import minimum_trials, table_form
from autoeff.search.job import JobSpec
from autoeff.search.limits import Limit, check_reachable, least_reachable, parse_limit
from autoeff.search.report import write_report
from autoeff.search.results import rows_of
from autoeff.search.runs import new_run, open_run
from autoeff.search.sampler import check_sampler
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Job, Trial
from autoeff.search.storage.store import Store
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import Split, measure
from autoeff.spaces.space import SearchSpace

__all__ = ["Plan", "Progress", "Result", "adding", "export", "plan", "resume", "run_search", "start"]

Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """What is known before any weight is loaded.

    Attributes:
        preflight: Model, text, memory, hardware, notices.
        minimum_trials: The least budget that holds dense, uniform levels, the cheap table and five more.
        least: Least reachable value of each cost measure.
        dense: The dense model's value of each.
        table: Form that the damage table takes under this budget.
        problem: What the samplers are told: space, costs, reachable limits, objectives, budget, seed.
    """

    spec: JobSpec
    preparation: Preparation
    minimum_trials: int
    least: Mapping[str, float]
    dense: Mapping[str, float]
    table: str
    problem: Problem

    @property
    def preflight(self) -> dict[str, Any]:
        return self.preparation.report()

    @property
    def space(self) -> SearchSpace:
        return self.preparation.space

    @property
    def limits(self) -> tuple[Limit, ...]:
        return self.problem.limits


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


def plan(spec: JobSpec, settings: Settings) -> Plan:
    """Checks a job and works out what arithmetic can.

    Raises:
        InputError: Bad model, text, knobs, objectives or limits, or too small a budget.
        UnreachableLimit: No configuration keeps the limits.
    """
    check_sampler(spec.sampler)
    preparation = prepare(spec.setup(settings.bank))
    context = spec.context or preparation.facts.context
    if context is None:
        raise InputError(f"model_type {preparation.facts.model_type!r} states no context length, which cache costs need; give --context")
    cost_model = CostModel(preparation.space, batch=spec.batch, context=context)
    objectives = _objectives(spec, preparation.quality, cost_model)
    limits = tuple(parse_limit(text, cost_model, preparation.quality) for text in spec.limits)
    check_reachable(limits, cost_model)
    windows = len(preparation.passages["search"].ids)
    least = minimum_trials(preparation.space, windows)
    if spec.budget.trials < least:
        raise InputError(
            f"budget.trials is {spec.budget.trials}; this space needs at least {least} (dense, uniform levels, cheap table and 5)"
        )
    return Plan(
        spec=spec,
        preparation=preparation,
        minimum_trials=least,
        least={name: float(least_reachable(cost_model, name)) for name in cost_model.measures},
        dense={name: float(cost_model.dense(name)) for name in cost_model.measures},
        table=table_form(preparation.space, spec.budget.trials, windows),
        problem=Problem(preparation.space, cost_model, limits, objectives, spec.budget.trials, windows, spec.seed),
    )


def start(spec: JobSpec, out: Path, settings: Settings, watch: Watch = lambda progress: None) -> Result:
    """Runs a new search into the folder `out`, which must not exist.

    Raises:
        InputError: As `plan`; also an existing or unwritable `out`.
    """
    planned = plan(spec, settings)
    with Store.open(settings.database) as store:
        job_id = uuid.uuid4().hex[:12]
        with new_run(out, job_id, settings.database) as folder:
            store.create_job(job_id, spec.model_dump(mode="json"), planned.preflight, planned.space.to_json(), planned.preparation.digest)
        return _drive(store, job_id, folder, planned, settings, watch)


def resume(run: str | Path, settings: Settings, watch: Watch = lambda progress: None) -> Result:
    """Goes on with a search that was stopped or killed; a finished one only writes its report again.

    Raises:
        InputError: No such run, another process drives it, or model, text or machine are no longer the same.
    """
    store, job_id, folder = open_run(run, settings)
    with store:
        planned, folder = _planned_again(store.job(job_id), run, folder, settings)
        return _drive(store, job_id, folder, planned, settings, watch)


@contextmanager
def adding(
    store: Store, job: Job, run: str | Path, folder: Path | None, settings: Settings, watch: Watch
) -> Iterator[Callable[[Candidate, Split], Trial]]:
    """Yields what measures a further configuration with the model of a finished job and stores it as a trial of that job.

    Raises:
        InputError: As `resume`; also a job that has not ended.
    """
    planned, folder = _planned_again(job, run, folder, settings)
    with Coordinator(store, job.id, planned, folder, settings, watch).adding() as evaluate:
        yield evaluate


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
    watch: Watch = lambda progress: None,
    **fields: Any,
) -> Result:
    """Searches `model` and returns what was found.

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

    Raises:
        InputError: Something passed is wrong.
    """
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
        setup = JobSpec.parse(job.spec).setup(settings.bank)
        return export_trial(job, store.trial(job_id, trial), setup, settings, folder, format_name).to_json()


def _drive(store: Store, job_id: str, folder: Path, planned: Plan, settings: Settings, watch: Watch) -> Result:
    coordinator = Coordinator(store, job_id, planned, folder, settings, watch)
    summary = coordinator.run()
    job = store.job(job_id)
    rows = rows_of(store, job_id)
    write_report(folder, job, rows, summary)
    exit_code = ExitCode.FEASIBLE if summary["state"] == "feasible" else ExitCode.INFEASIBLE
    return Result(job_id, folder, exit_code, summary, rows)


def _planned_again(job: Job, run: str | Path, folder: Path | None, settings: Settings) -> tuple[Plan, Path]:
    """The plan of a stored job, found to be what it was, and its run directory."""
    if folder is None:
        raise InputError(f"job {job.id} has no run directory here; name the directory that its search wrote to")
    planned = plan(JobSpec.parse(job.spec), settings)
    if planned.preparation.digest != job.setup_digest:
        raise InputError(f"run {run} cannot go on: {_changed(job.preflight, planned.preflight)}")
    return planned, folder


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is no longer as it was at the start of a run, of all that its values depend on."""
    for what, (old, new) in {
        "the model's files": [p["model"]["digest"] for p in (before, now)],
        "the search text": [p["text"]["search"]["digest"] for p in (before, now)],
        "the held-out text": [p["text"]["held_out"]["digest"] for p in (before, now)],
        "the hardware": [p["hardware"] for p in (before, now)],
        "torch": [p["torch"] for p in (before, now)],
    }.items():
        if old != new:
            remedy = f"; set OMP_NUM_THREADS={old[5:]}" if old[:5] == new[:5] == "cpu x" else ""
            return f"{what} changed from {old} to {new}{remedy}"
    return "this version of autoeff evaluates otherwise; use the one that started it"


def _objectives(spec: JobSpec, quality: str, cost_model: CostModel) -> tuple[str, ...]:
    names = tuple(quality if name == "quality" else name for name in spec.objectives)
    if names[0] != quality:
        measure(names[0])
        raise InputError(f"the first objective is {names[0]!r}; on this model it must be {quality} (or the word quality)")
    for name in names[1:]:
        if name not in cost_model.measures:
            measure(name)
            raise InputError(f"objective {name!r} is no cost known before an evaluation; allowed: {', '.join(cost_model.measures)}")
    return names
