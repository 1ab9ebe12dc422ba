"""Drives one job in this process: ask, evaluate, tell, stop; then confirm and sum up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoeff.errors import AutoeffError
from autoeff.search.guests import Candidate, finalists, preamble
from autoeff.search.limits import feasible
from autoeff.search.pareto import non_dominated
from autoeff.search.results import all_trials, end_row, search_trials
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.settings import Settings
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import Claim, JobState, Proposal, State, Trial
from autoeff.search.storage.store import Store
from autoeff.search.worker import Worker
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.measurements import Split

if TYPE_CHECKING:
    from autoeff.search.run import Plan

__all__ = ["Coordinator", "Progress"]

_COMPLETION_TOKENS = 48


@dataclass(frozen=True)
class Progress:
    """Where a search stands.

    Attributes:
        phase: loading, bank, baselines, table, search, confirming, reporting or done.
        done: Trials so far, or bank entries while the bank is built.
        total: Of bank entries; 0 elsewhere.
        used: Budget used, in full-token equivalents.
        best: Least quality of a feasible configuration at full fidelity.
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
        plan: What preparation found.
        folder: The run directory.
        settings: Of this machine.
        watch: Hears of progress.
    """

    def __init__(
        self, store: Store, job_id: str, plan: Plan, folder: Path, settings: Settings, watch: Callable[[Progress], None]
    ) -> None:
        self._store, self._job_id, self._plan, self._settings, self._watch = store, job_id, plan, settings, watch
        self._me = process_identity()
        self._setup = plan.spec.setup(settings.bank)
        self._runner = RunnerProcess(self._setup, settings, folder / "runner.log", lambda done, total: self._report("bank", done, total))
        self._worker = Worker(store, self._runner, settings.lease_s)
        self._full = {split: len(passages.ids) for split, passages in plan.preparation.passages.items()}
        self._quality = plan.preparation.quality
        self._fence = 0
        self._stored: list[Trial] = []
        self._trials: list[Trial] = []
        self._told: list[int] = []
        self._started = self._renewed = time.monotonic()
        self._phase = "loading"

    def run(self) -> dict[str, Any]:
        """Searches to the end of the budget and returns the summary, which is stored with the job.

        Raises:
            AutoeffError: Something outside the candidates failed; the job can be resumed.
            KeyboardInterrupt: The user stopped; the job is paused and can be resumed.
        """
        self._fence = self._store.acquire_coordinator(self._job_id, self._me, self._settings.lease_s)
        ending = JobState.FAILED
        try:
            job = self._store.job(self._job_id)
            if job.state is JobState.SUCCEEDED and job.result is not None:
                return dict(job.result)
            self._store.set_job_state(self._job_id, self._fence, JobState.RUNNING)
            self._store.reap()
            self._stored = all_trials(self._store, self._job_id)
            for notice in self._plan.preparation.notices:
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

    # Searching

    def _search(self) -> dict[str, Any]:
        baselines = self._baselines()
        self._phase = "search"
        sampler = make_sampler(self._problem, self._plan.spec.sampler, baselines)
        while (candidate := sampler.ask(self._trials)) is not None and self._budget_left(candidate):
            sampler.tell(self._evaluate(candidate))
        self._phase = "confirming"
        self._confirm(baselines)
        self._report("reporting")
        return self._summary(baselines)

    def _baselines(self) -> Baselines:
        """Evaluates the guests of every search, batch by batch."""
        self._phase = "baselines"
        guests = preamble(self._problem)
        batch = next(guests)
        while True:
            values = [self._evaluate(candidate).value(self._quality) for candidate in batch]
            try:
                batch = guests.send(values)
            except StopIteration as end:
                found: Baselines = end.value
                return found

    def _budget_left(self, candidate: Candidate) -> bool:
        seconds = self._plan.spec.budget.seconds
        if seconds is not None and time.monotonic() - self._started > seconds:
            return False
        used = sum(trial.cost for trial in self._trials)
        return used + candidate.windows / self._problem.windows <= self._plan.spec.budget.trials + 1e-9

    def _confirm(self, baselines: Baselines) -> None:
        """Measures the guests, the finalists and the front on the held-out text."""
        chosen: dict[str, Candidate] = {}
        for trial in [*self._guests(baselines), *self._finalists(), *self._front_trials(_FRONT_CONFIRMED)]:
            indices = self._plan.space.indices(trial.configuration.levels)
            label = f"held-out of trial {trial.number}"
            chosen.setdefault(trial.configuration.digest, Candidate(indices, self._full["held_out"], trial.origin, label))
        for candidate in chosen.values():
            self._evaluate(candidate, "held_out")

    # Evaluating

    def _evaluate(self, candidate: Candidate, split: Split = "search") -> Trial:
        """The finished trial of a candidate: from the tables if it is there, else evaluated now."""
        number = len(self._trials)
        configuration = self._plan.space.at(candidate.indices)
        if number < len(self._stored):
            stored = self._stored[number]
            if (stored.configuration, stored.windows, stored.split) != (configuration, candidate.windows, split):
                raise AutoeffError(f"trial {number} of job {self._job_id} is not what this version proposes there; start a new search")
            if not stored.state.terminal:
                stored = self._finish(stored, None)
            return self._remember(stored)
        reference = self._store.propose(
            self._job_id,
            self._fence,
            self._proposal(number, candidate, split),
            told=self._told,
            claim_for=self._me,
            ttl_s=self._settings.lease_s,
        )
        self._told.clear()
        trial = self._store.trial(self._job_id, number)
        return self._remember(trial if trial.state.terminal else self._finish(trial, reference.claim))

    def _proposal(self, number: int, candidate: Candidate, split: Split) -> Proposal:
        configuration = self._plan.space.at(candidate.indices)
        searching = split == "search"
        return Proposal(
            number=number,
            configuration=configuration,
            origin=candidate.origin,
            split=split,
            windows=candidate.windows,
            cost=candidate.windows / self._full["search"] if searching else 0.0,
            eval_key=digest_of([self._plan.preparation.digest, configuration.digest, split, candidate.windows]),
            costs=self._plan.cost_model.values(candidate.indices),
            feasible=feasible(self._plan.limits, self._plan.cost_model, candidate.indices),
            label=candidate.label,
            sampler_state=candidate.state,
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
        self._keep_lease()
        self._report(self._phase)
        return trial

    def _keep_lease(self) -> None:
        if time.monotonic() - self._renewed > self._settings.lease_s / 3:
            self._store.renew_coordinator(self._job_id, self._fence, self._settings.lease_s)
            self._renewed = time.monotonic()

    # Telling the user

    def _report(self, phase: str, done: int | None = None, total: int = 0, notice: str | None = None) -> None:
        self._phase = phase
        seconds = time.monotonic() - self._started
        used, budget = sum(t.cost for t in self._trials), float(self._plan.spec.budget.trials)
        full = search_trials(self._trials, self._quality, self._full["search"])
        best = min((t.value(self._quality) or 0.0 for t in full if t.feasible and t.origin != "dense"), default=None)
        self._watch(
            Progress(
                phase=phase,
                done=len(self._trials) if done is None else done,
                total=total,
                used=used,
                budget=budget,
                best=best,
                quality=self._quality,
                front=len(self._front),
                failures=sum(t.failure is not None for t in self._trials),
                seconds=seconds,
                eta_s=seconds / used * (budget - used) if used else None,
                notice=notice,
            )
        )
