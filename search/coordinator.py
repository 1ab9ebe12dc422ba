"""Drives one job in this process: ask, evaluate, tell, stop; then confirm and sum up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from autoeff.errors import AutoeffError, InputError
from autoeff.search.guests import finalists
from autoeff.search.results import Results, all_trials
from autoeff.search.samplers.problem import Candidate
from autoeff.search.settings import Settings
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import Claim, JobState, Proposal, Trial
from autoeff.search.storage.store import Store
from autoeff.search.study import Asked, Study
from autoeff.search.subject import Subject
from autoeff.search.worker import Worker
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.measurements import Split

__all__ = ["Coordinator", "Progress"]

_FRONT_CONFIRMED = 12


@dataclass(frozen=True)
class Progress:
    """Where a search stands.

    Attributes:
        phase: loading, bank, baselines, table, search, confirming, reporting or done; measuring, where trials are added to a finished job.
        done: Trials so far, or bank entries while the bank is built.
        total: Of bank entries; 0 elsewhere.
        used: Budget used, in full-token equivalents.
        best: Best quality of a feasible configuration at full fidelity.
        front: Size of the Pareto front.
        failures: Candidates that failed.
        eta_s: Seconds left at the present pace.
        notice: A line to be shown once.
    """

    phase: str
    done: int
    total: int
    used: float
    budget: float
    best: float | None
    quality: str
    front: int
    failures: int
    seconds: float
    eta_s: float | None
    notice: str | None = None


class Coordinator:
    """Searches for one job.

    On `resume` the same plan is followed from its beginning: a trial that is stored already answers from the tables instead of
    the runner, so the search goes on where it was with everything that it had learnt.

    Args:
        store: Holds the job.
        job_id: Of the job.
        subject: What is searched, and who measures it.
        folder: The run directory.
        settings: Of this machine.
        watch: Hears of progress.
    """

    def __init__(
        self, store: Store, job_id: str, subject: Subject, folder: Path, settings: Settings, watch: Callable[[Progress], None]
    ) -> None:
        self._store, self._job_id, self._subject, self._settings, self._watch = store, job_id, subject, settings, watch
        self._me = process_identity()
        self._runner = subject.runner(settings, folder / "runner.log", lambda done, total: self._report("bank", done, total))
        self._worker = Worker(store, self._runner, settings.lease_s)
        self._problem = subject.problem
        self._quality = self._problem.quality
        self._budget = subject.budget
        self._fence = 0
        self._stored: list[Trial] = []
        self._trials: list[Trial] = []
        self._told: list[int] = []
        self._started = self._renewed = time.monotonic()
        self._phase = self._reported = "loading"
        self._quiet_until = 0.0
        self._first_done: float | None = None
        self._overhead: dict[str, list[float]] = {"ask": [], "propose": [], "process_and_commit": []}  # seconds a trial, of this process

    def run(self) -> dict[str, Any]:
        """Searches to the end of the budget and returns the summary, which is stored with the job.

        Raises:
            AutoeffError: Something outside the candidates failed; the job can be resumed.
            KeyboardInterrupt: The user stopped; the job is paused and can be resumed.
        """
        self._fence = self._store.acquire_coordinator(self._job_id, self._me, self._settings.lease_s)
        try:
            job = self._store.job(self._job_id)
            if job.state is JobState.SUCCEEDED and job.result is not None:
                return dict(job.result)
            self._store.set_job_state(self._job_id, self._fence, JobState.RUNNING)
            self._store.reap()
            self._stored = all_trials(self._store, self._job_id)
            for notice in self._subject.notices:
                self._report("loading", notice=notice)
            summary = self._search()
            self._store.set_job_state(self._job_id, self._fence, JobState.SUCCEEDED, summary)
            self._report("done")
            return summary
        except BaseException:
            self._store.set_job_state(self._job_id, self._fence, JobState.PAUSED)
            raise
        finally:
            self._runner.close()
            self._store.release_coordinator(self._job_id, self._fence)

    @contextmanager
    def adding(self) -> Iterator[Callable[[Candidate, Split], Trial]]:
        """Yields what measures a further configuration for a finished job; the trials and the summary that it has stay as they are.

        Raises:
            InputError: The job has not ended: its sampler would not find its own trials again; or another process drives it.
        """
        self._fence = self._store.acquire_coordinator(self._job_id, self._me, self._settings.lease_s)
        try:
            job = self._store.job(self._job_id)
            if job.state is not JobState.SUCCEEDED:
                raise InputError(f"job {job.id} is {job.state}; trials can be added when it has ended: `autoeff resume` goes on with it")
            self._store.reap()
            for trial in all_trials(self._store, self._job_id):  # a killed addition may have left one open
                self._trials.append(self._finish(trial, None))
            self._stored = list(self._trials)
            self._phase = "measuring"
            yield lambda candidate, split: self._evaluate(candidate, split)
        finally:
            self._runner.close()
            self._store.release_coordinator(self._job_id, self._fence)

    # Searching

    def _search(self) -> dict[str, Any]:
        self._phase = "baselines"
        guests = self._subject.guests()
        batch = next(guests)
        with suppress(StopIteration):
            while True:
                batch = guests.send([self._evaluate(candidate).value(self._quality) for candidate in batch])
        if self._subject.sampler is not None:
            self._phase = "search"
            study = Study(self._problem, self._subject.sampler)
            for trial in self._trials:
                study.tell(trial)
            while (asked := self._ask(study)) is not None and self._affordable(asked.candidate):
                study.tell(self._evaluate(asked.candidate, state=asked.state))
            if self._subject.held_out_windows:
                self._phase = "confirming"
                self._confirm(self._subject.held_out_windows)
        self._report("reporting")
        results = self._results()
        return {
            **results.summary(),
            **self._subject.closing(results, self._trials, self._runner),
            "seconds": time.monotonic() - self._started,
            "evaluations": self._used,
            "overhead_ms": {name: median(values) * 1e3 for name, values in self._overhead.items() if values},
            "notices": self._subject.notices,
        }

    def _confirm(self, windows: int) -> None:
        """Measures the guests, the finalists and the front on the held-out text."""
        results = self._results()
        values = {self._indices(trial): results.quality(trial) for trial in results.full.values()}
        chosen = [trial.configuration.digest for _, _, trial in results.guests()]
        chosen += [self._problem.space.at(indices).digest for indices in finalists(self._problem, values)]
        front = results.front()
        chosen += [trial.configuration.digest for trial in front[:: -(-len(front) // _FRONT_CONFIRMED) or 1]]
        for digest in dict.fromkeys(chosen):
            trial = results.full[digest]
            self._evaluate(Candidate(self._indices(trial), windows, trial.origin, f"held-out of trial {trial.number}"), "held_out")

    def _ask(self, study: Study) -> Asked | None:
        started = time.perf_counter()
        asked = study.ask(len(self._trials))
        self._overhead["ask"].append(time.perf_counter() - started)
        return asked

    def _affordable(self, candidate: Candidate) -> bool:
        seconds = self._subject.seconds
        used = self._used + candidate.windows / self._problem.windows
        return (seconds is None or self._elapsed < seconds) and used <= self._problem.trials

    @property
    def _used(self) -> float:
        return sum(trial.cost for trial in self._trials)

    @property
    def _elapsed(self) -> float:
        """Wall time of the search: of this process, and of the evaluations of those before it."""
        return time.monotonic() - self._started + sum(trial.seconds or 0.0 for trial in self._stored)

    def _results(self) -> Results:
        return Results(self._problem, self._trials)

    def _indices(self, trial: Trial) -> tuple[int, ...]:
        return self._problem.space.indices(trial.configuration.levels)

    # Evaluating

    def _evaluate(self, candidate: Candidate, split: Split = "search", state: dict[str, Any] | None = None) -> Trial:
        """The finished trial of a candidate: from the tables if it is there, else evaluated now."""
        number = len(self._trials)
        configuration = self._problem.space.at(candidate.indices)
        if number < len(self._stored):
            stored = self._stored[number]
            if (stored.configuration, stored.windows, stored.split) != (configuration, candidate.windows, split):
                raise AutoeffError(f"trial {number} of job {self._job_id} is not what this version proposes there; start a new search")
            if not stored.state.terminal:
                stored = self._finish(stored, None)
            return self._remember(stored)
        started = time.perf_counter()
        reference = self._store.propose(
            self._job_id,
            self._fence,
            self._proposal(number, candidate, split, state),
            told=self._told,
            claim_for=self._me,
            ttl_s=self._settings.lease_s,
        )
        self._told.clear()
        trial = self._store.trial(self._job_id, number)
        self._overhead["propose"].append(time.perf_counter() - started)
        if not trial.state.terminal:
            trial = self._finish(trial, reference.claim)
            self._overhead["process_and_commit"].append(time.perf_counter() - started - (trial.seconds or 0.0))
        return self._remember(trial)

    def _proposal(self, number: int, candidate: Candidate, split: Split, state: dict[str, Any] | None) -> Proposal:
        configuration = self._problem.space.at(candidate.indices)
        return Proposal(
            number=number,
            configuration=configuration,
            origin=candidate.origin,
            split=split,
            windows=candidate.windows,
            cost=candidate.windows / self._problem.windows if split == "search" else 0.0,
            eval_key=digest_of([self._subject.digest, configuration.digest, split, candidate.windows]),
            costs={
                m.name: m.value if m.method == "exact" else {"value": m.value, "method": m.method}
                for m in self._problem.cost_model.measurements(candidate.indices)
            },
            feasible=self._problem.feasible(candidate.indices),
            label=candidate.label,
            sampler_state=state,
        )

    def _finish(self, trial: Trial, claim: Claim | None) -> Trial:
        """Works on a trial until it has an outcome; a lost runner is replaced until the store gives the candidate up."""
        while not trial.state.terminal:
            claim = claim or self._store.claim(trial.evaluation_id, self._me, self._settings.lease_s)
            if claim is None:  # equal work of another job is under way in another process
                time.sleep(0.2)
                self._store.reap()
            else:
                self._worker.work(claim)
            claim = None
            self._keep_lease()
            trial = self._store.trial(self._job_id, trial.number)
        return trial

    def _remember(self, trial: Trial) -> Trial:
        self._trials.append(trial)
        if trial.number >= len(self._stored):
            self._told.append(trial.number)
            self._first_done = self._first_done or time.monotonic()
        self._keep_lease()
        self._report(self._phase)
        return trial

    def _seconds_left(self, used: float) -> float | None:
        """At the pace of this process since its first evaluation; None before there is one."""
        fresh = sum(trial.cost for trial in self._trials[len(self._stored) + 1 :])
        if not fresh or self._first_done is None or used > self._budget:
            return None
        return max(0.0, (time.monotonic() - self._first_done) / fresh * (self._budget - used))

    def _keep_lease(self) -> None:
        if time.monotonic() - self._renewed > self._settings.lease_s / 3:
            self._store.renew_coordinator(self._job_id, self._fence, self._settings.lease_s)
            self._renewed = time.monotonic()

    # Telling the user

    def _report(self, phase: str, done: int | None = None, total: int = 0, notice: str | None = None) -> None:
        now = time.monotonic()
        if phase == self._reported and notice is None and now < self._quiet_until:
            return
        self._reported = phase
        seconds, used, results = now - self._started, self._used, self._results()
        within = [t for t in results.within(self._problem.limits) if t.origin != "dense"]
        self._watch(
            Progress(
                phase=phase,
                done=len(self._trials) if done is None else done,
                total=total,
                used=used,
                budget=self._budget,
                best=within[0].value(self._quality) if within else None,
                quality=self._quality,
                front=len(results.front()),
                failures=sum(t.failure is not None for t in self._trials),
                seconds=seconds,
                eta_s=self._seconds_left(used),
                notice=notice,
            )
        )
        self._quiet_until = time.monotonic() + 50 * (time.monotonic() - now)  # however many trials: 2 % of the time
