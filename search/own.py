"""Searches code of the user's own with the engine that searches models: any module, or anything else that a function builds."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoeff.errors import InputError
from autoeff.evaluators.metrics import NAME, Metric
from autoeff.evaluators.preparation import hardware_name
from autoeff.search.forked import Build, ForkedRunner
from autoeff.search.own_job import Choice, OwnJob, OwnProblem, is_own
from autoeff.search.results import Results
from autoeff.search.run import Result, Watch, default_folder, drive
from autoeff.search.runs import new_run, open_run
from autoeff.search.sampler import check_sampler
from autoeff.search.samplers.problem import Candidate, stream
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Trial
from autoeff.search.storage.store import Store
from autoeff.search.subject import Guests
from autoeff.search.worker import Runner
from autoeff.spaces.configuration import digest_of

__all__ = ["OwnPlan", "search_own"]

_RANDOM, _REDRAWS = 32, 4  # most random baselines, and draws for each before small spaces count as exhausted


@dataclass(frozen=True)
class OwnPlan:
    """A search of the user's own code, ready to be driven.

    Attributes:
        job_id: Functions have no digest, so values are shared within their job alone.
        job: All but the functions.
        build: Makes a candidate.
        metrics: Measure it, by name.
    """

    job_id: str
    job: OwnJob
    build: Build
    metrics: Mapping[str, Metric]

    @property
    def problem(self) -> OwnProblem:
        return self.job.problem

    @property
    def digest(self) -> str:
        return digest_of([self.job_id, self.job.to_json()["space"]])

    @property
    def notices(self) -> Sequence[str]:
        return ["CUDA is initialised in this process, so no candidate can use it"] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    @property
    def sampler(self) -> str | None:
        return self.job.sampler

    @property
    def budget(self) -> float:
        return float(self.job.trials)

    @property
    def seconds(self) -> float | None:
        return self.job.seconds

    @property
    def held_out_windows(self) -> int:
        return 0

    def guests(self, runner: Runner | None) -> Guests:
        """The reference configuration, then `min(32, N/5)` random ones."""
        space = self.problem.space
        reference = (0,) * len(space.decisions)
        yield [Candidate(reference, 1, "dense", "reference")]
        count, rng = min(_RANDOM, self.job.trials // 5), stream(self.job.seed, "random")
        drawn: dict[tuple[int, ...], None] = {}
        for _ in range(_REDRAWS * count):
            indices = space.sample(rng)
            if indices != reference and len(drawn) < count:
                drawn[indices] = None
        yield [Candidate(indices, 1, "random") for indices in drawn]

    def runner(self, settings: Settings, log: Path, progress: Callable[[int, int], None]) -> ForkedRunner:
        reference = self.problem.space.dense_configuration.levels
        return ForkedRunner(self.build, self.metrics, self.job.needed, reference, self.job.seed, settings, log)

    def beside_found(self, results: Results, trials: Sequence[Trial]) -> list[Candidate]:
        return []  # nothing is confirmed

    def closing(self, results: Results, trials: Sequence[Trial], runner: Runner | None) -> dict[str, Any]:
        return {"table": None, "additivity": None, "completions": None}

    def preflight(self) -> dict[str, Any]:
        """What is known before the first evaluation."""
        return {
            "quality": self.problem.quality,
            "decisions": len(self.problem.space.decisions),
            "configurations": str(self.problem.space.size),
            "hardware": hardware_name(torch.device("cpu")),
            "torch": torch.__version__,
            "notices": list(self.notices),
        }


def search_own(
    build: Build,
    space: Mapping[str, Choice],
    metrics: Iterable[Metric] | Mapping[str, Metric],
    *,
    objectives: Iterable[str],
    limits: Iterable[str] = (),
    trials: int = 100,
    timeout: float | None = None,
    seed: int = 0,
    sampler: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    watch: Watch = lambda progress: None,
) -> Result:
    """Searches what `build` makes; `autoeff.run_search` documents it.

    Raises:
        InputError: Something passed is wrong.
    """
    if not hasattr(os, "fork"):
        raise InputError(f"own code is measured in forked processes, which {sys.platform} has not; use Linux or macOS")
    named, wanted = _named(metrics), _texts(objectives, "objectives")
    for name, values in space.items():
        if not isinstance(name, str) or not name or not isinstance(values, Choice):
            raise InputError(f"space[{name!r}] is {values!r}; write space={{{name!r}: autoeff.choice(2, 4, 6)}}")
    job = OwnJob(
        build=f"{getattr(build, '__module__', '?')}.{getattr(build, '__qualname__', type(build).__qualname__)}",
        levels=tuple((name, values.values) for name, values in space.items()),
        metrics=tuple(named),
        objectives=wanted,
        limits=_texts(limits, "limits"),
        trials=trials,
        seconds=timeout,
        seed=seed,
        sampler=sampler or ("tpe" if len(wanted) == 1 else "nsga2"),
    )
    check_sampler(job.sampler)
    settings = Settings.read()
    if resume:
        return _resumed(job, build, named, out, settings, watch)
    planned = OwnPlan(uuid.uuid4().hex[:12], job, build, named)
    folder = default_folder(job.build.rpartition(".")[2]) if out is None else Path(out)
    with Store.open(settings.database) as store:
        with new_run(folder, planned.job_id, settings.database) as made:
            store.create_job(planned.job_id, job.to_json(), planned.preflight(), planned.problem.space.to_json(), planned.digest)
        return drive(store, planned.job_id, made, planned, settings, watch)


def _resumed(job: OwnJob, build: Build, metrics: Mapping[str, Metric], out: str | Path | None, settings: Settings, watch: Watch) -> Result:
    if out is None:
        raise InputError("resume=True goes on with the run in out; name it")
    store, job_id, folder = open_run(out, settings)
    with store:
        stored = store.job(job_id)
        if not is_own(stored):
            raise InputError(f"run {out} searches the model {stored.spec['model']}; `autoeff resume {out}` goes on with it")
        if folder is None:
            raise InputError(f"job {job_id} has no run directory here; name the directory that its search wrote to")
        job.check_same(OwnJob.from_json(stored.spec), out)
        return drive(store, job_id, folder, OwnPlan(job_id, job, build, metrics), settings, watch)


def _named(metrics: Iterable[Metric] | Mapping[str, Metric]) -> dict[str, Metric]:
    pairs = list(metrics.items()) if isinstance(metrics, Mapping) else [(getattr(m, "__name__", repr(m)), m) for m in metrics]
    for name, metric in pairs:
        if not callable(metric):
            raise InputError(f"metric {name!r} is a {type(metric).__name__}; functions of a candidate are needed")
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise InputError(f'a metric is called {name!r}; name it, as in metrics={{"accuracy": function}}')
    if not pairs or len(dict(pairs)) < len(pairs):
        raise InputError(f"metrics are {', '.join(name for name, _ in pairs) or 'none'}; at least one is needed, and each name once")
    return dict(pairs)


def _texts(value: Iterable[str], what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        raise InputError(f"{what} is the text {value!r}; a list is needed: {what}=[{value!r}]")
    return tuple(value)
