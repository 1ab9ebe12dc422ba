"""Drives one job: ask, have it evaluated, tell, stop; then confirm and sum up. Who evaluates is the crew's to know (`crew`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from autoeff.errors import AutoeffError, Conflict, InputError, LeaseLost, StorageError
from autoeff.search.crew import Crew, Here, Stopped
from autoeff.search.guests import finalists
from autoeff.search.results import Results, all_trials, evaluation_key
from autoeff.search.samplers.problem import Candidate
from autoeff.search.settings import Settings
from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import JobState, Proposal, Trial
from autoeff.search.storage.store import Store
from autoeff.search.study import Study
from autoeff.search.subject import Subject
from autoeff.spaces.measurements import Split

__all__ = ["Coordinator", "Progress"]

_FRONT_CONFIRMED = 12
_LOOK_S = 1.0  # between looks at what the user of the job wants, where the lease is not shorter


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

    A resumed search goes through its baselines again, answered from the tables instead of the runner, tells its sampler what is
    stored, and goes on where it was with everything that it had learnt.

    Args:
        store: Holds the job.
        job_id: Of the job.
        subject: What is searched, and who measures it.
        folder: The run directory.
        settings: Of this machine.
        watch: Hears of progress.
        crew: Who evaluates; by default one runner in this process.
    """

    def __init__(
        self,
        store: Store,
        job_id: str,
        subject: Subject,
        folder: Path,
        settings: Settings,
        watch: Callable[[Progress], None],
        crew: Crew | None = None,
    ) -> None:
        self._store, self._job_id, self._subject, self._settings, self._watch = store, job_id, subject, settings, watch
        self._me = process_identity()
        self._crew = crew or Here(
            store,
            subject.runner(settings, folder / "runner.log", lambda done, total: self._report("bank", done, total)),
            settings.lease_s,
        )
        self._problem = subject.problem
        self._quality = self._problem.quality
        self._trials_wanted, self._seconds_wanted = self._problem.trials, subject.seconds
        self._fence = 0
        self._stored: list[Trial] = []
        self._done: dict[int, Trial] = {}
        self._open: dict[int, Trial] = {}
        self._used = 0.0
        self._told: list[int] = []
        self._started = self._renewed = time.monotonic()
        self._looked = float("-inf")
        self._phase = self._reported = "loading"
        self._quiet_until = 0.0
        self._first_done: float | None = None
        self._overhead: dict[str, list[float]] = {"ask": [], "propose": [], "process_and_commit": []}  # seconds a trial, of this process

    def run(
        self, after_error: Callable[[BaseException], tuple[JobState, str | None] | None] = lambda error: (JobState.PAUSED, None)
    ) -> dict[str, Any]:
        """Searches to the end of the budget and returns the summary, which is stored with the job.

        Args:
            after_error: What the job becomes after an error, and why; None where it stays as it is and is taken up again.

        Raises:
            Stopped: The user has the job paused or cancelled.
            AutoeffError: Something outside the candidates failed; the job can be resumed.
            KeyboardInterrupt: The user stopped; the job is paused and can be resumed.
        """
        self._fence = self._store.acquire_coordinator(self._job_id, self._me, self._settings.lease_s)
        try:
            job = self._store.job(self._job_id)
            if job.state is JobState.SUCCEEDED and job.result is not None:
                return dict(job.result)
            self._begin()
            self._look()
            self._reap()
            self._stored = all_trials(self._store, self._job_id)
            self._told = [trial.number for trial in self._stored if trial.state.terminal and not trial.told]
            for notice in self._subject.notices:
                self._report("loading", notice=notice)
            summary = self._search()
            self._store.mark_told(self._job_id, self._fence, self._told)
            self._store.set_job_state(self._job_id, self._fence, JobState.SUCCEEDED, summary)
            self._report("done")
            return summary
        except Stopped:
            raise
        except BaseException as error:
            if (after := after_error(error)) is not None:
                with suppress(LeaseLost, StorageError, InputError):
                    self._store.set_job_state(self._job_id, self._fence, after[0], error=after[1])
            raise
        finally:
            self._crew.close()
            with suppress(StorageError):  # else it ends by itself
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
            self._reap()
            self._stored = all_trials(self._store, self._job_id)
            for trial in self._stored:  # a killed addition may have left one open
                self._take_up(trial)
            while self._open:
                self._wait()
            self._phase = "measuring"
            yield lambda candidate, split: self._evaluate([candidate], split)[0]
            self._store.mark_told(self._job_id, self._fence, self._told)
        finally:
            self._crew.close()
            self._store.release_coordinator(self._job_id, self._fence)

    # Searching

    def _search(self) -> dict[str, Any]:
        self._enter("baselines")
        guests = self._subject.guests(self._crew.runner)
        batch = next(guests)
        with suppress(StopIteration):
            while True:
                # What was tried again later has failed when the next guests were chosen, and they must be the same.
                batch = guests.send([None if trial.earlier else trial.value(self._quality) for trial in self._evaluate(batch)])
        if self._subject.sampler is not None:
            self._enter("search")
            baselines = len(self._done)
            for trial in self._stored[baselines:]:
                self._take_up(trial)
            self._ask_and_tell(self._subject.sampler)
            if self._subject.held_out_windows:
                self._enter("confirming")
                self._confirm(self._subject.held_out_windows)
        self._report("reporting")
        results = self._results()
        return {
            **results.summary(),
            **self._subject.closing(results, self._trials(), self._crew.runner),
            "seconds": time.monotonic() - self._started,
            "evaluations": self._used,
            "overhead_ms": {name: median(values) * 1e3 for name, values in self._overhead.items() if values},
            "notices": self._subject.notices,
        }

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._store.tell(self._job_id, self._fence, "job.phase", {"phase": phase})

    def _ask_and_tell(self, sampler: str) -> None:
        """Searches until the budget is spent, or the sampler has no more to propose and nothing is left that could change its mind."""
        study, wanted, over = self._study(sampler), self._trials_wanted, False
        while True:
            if wanted != self._trials_wanted:
                study, wanted, over = self._study(sampler), self._trials_wanted, False
            number = None
            if len(self._open) < self._crew.width() and not over and not self._spent:
                started = time.perf_counter()
                asked = study.ask(len(self._done) + len(self._open))
                self._overhead["ask"].append(time.perf_counter() - started)
                if asked is not None and self._affordable(asked.candidate):
                    number = self._propose(asked.candidate, "search", asked.state)
                else:
                    over = asked is not None
            if number is not None and number in self._done:  # equal work was done before
                study.tell(self._done[number])
            elif number is None or len(self._open) >= self._crew.width():
                if not self._open:
                    return
                for trial in self._wait():
                    study.tell(trial)

    def _study(self, sampler: str) -> Study:
        study = Study(replace(self._problem, trials=self._trials_wanted), sampler)
        for number in sorted({**self._done, **self._open}):
            if number in self._done:
                study.tell(self._done[number])
            else:
                study.adopt(self._open[number])
        return study

    def _confirm(self, windows: int) -> None:
        """Measures the guests, the finalists and the front on the held-out text."""
        results = self._results()
        values = {self._indices(trial): results.quality(trial) for trial in results.full.values()}
        chosen = [trial.configuration.digest for _, _, trial in results.guests()]
        chosen += [self._problem.space.at(indices).digest for indices in finalists(self._problem, values)]
        front = results.front()
        chosen += [trial.configuration.digest for trial in front[:: -(-len(front) // _FRONT_CONFIRMED) or 1]]
        known = {trial.configuration.digest for trial in self._done.values() if trial.split == "held_out"}
        wanted = [results.full[digest] for digest in dict.fromkeys(chosen) if digest not in known]
        self._evaluate(
            [Candidate(self._indices(trial), windows, trial.origin, f"held-out of trial {trial.number}") for trial in wanted], "held_out"
        )
        beside = self._subject.beside_found(self._results(), self._trials())
        self._evaluate([c for c in beside if self._problem.space.at(c.indices).digest not in {*known, *chosen}], "held_out")

    @property
    def _spent(self) -> bool:
        late = self._seconds_wanted is not None and self._elapsed >= self._seconds_wanted
        return late or self._used >= self._trials_wanted

    def _affordable(self, candidate: Candidate) -> bool:
        return self._used + candidate.windows / self._problem.windows <= self._trials_wanted

    @property
    def _elapsed(self) -> float:
        """Wall time of the search: of this process, and of the evaluations of those before it."""
        return time.monotonic() - self._started + sum(trial.seconds or 0.0 for trial in self._stored)

    def _trials(self) -> list[Trial]:
        return [self._done[number] for number in sorted(self._done)]

    def _results(self) -> Results:
        return Results(self._problem, self._trials())

    def _indices(self, trial: Trial) -> tuple[int, ...]:
        return self._problem.space.indices(trial.configuration.levels)

    # Evaluating

    def _evaluate(self, candidates: Iterable[Candidate], split: Split = "search") -> list[Trial]:
        """The finished trials of candidates that do not depend on each other, in their order."""
        numbers = []
        for candidate in candidates:
            while len(self._open) >= self._crew.width():
                self._wait()
            numbers.append(self._propose(candidate, split))
        while self._open:
            self._wait()
        return [self._done[number] for number in numbers]

    def _propose(self, candidate: Candidate, split: Split, state: dict[str, Any] | None = None) -> int:
        """Makes a trial of a candidate, unless it is stored already, and returns its number."""
        number = len(self._done) + len(self._open)
        if number < len(self._stored):
            stored = self._stored[number]
            configuration = self._problem.space.at(candidate.indices)
            if (stored.configuration, stored.windows, stored.split) != (configuration, candidate.windows, split):
                raise AutoeffError(f"trial {number} of job {self._job_id} is not what this version proposes there; start a new search")
            self._take_up(stored)
            return number
        self._look()
        started = time.perf_counter()
        try:
            reference = self._store.propose(
                self._job_id,
                self._fence,
                self._proposal(number, candidate, split, state),
                told=self._told,
                claim_for=self._crew.claims,
                ttl_s=self._settings.lease_s,
            )
        except Conflict as error:
            raise Stopped(str(error)) from None
        self._told.clear()
        trial = self._store.trial(self._job_id, number)
        self._overhead["propose"].append(time.perf_counter() - started)
        self._used += trial.cost
        if trial.state.terminal:
            self._remember(trial)
        else:
            self._open[number] = trial
            self._crew.begin(trial, reference.claim)
        return number

    def _proposal(self, number: int, candidate: Candidate, split: Split, state: dict[str, Any] | None) -> Proposal:
        configuration = self._problem.space.at(candidate.indices)
        return Proposal(
            number=number,
            configuration=configuration,
            origin=candidate.origin,
            split=split,
            windows=candidate.windows,
            cost=candidate.windows / self._problem.windows if split == "search" else 0.0,
            eval_key=evaluation_key(self._subject.digest, configuration.digest, split, candidate.windows),
            costs={
                m.name: m.value if m.method == "exact" else {"value": m.value, "method": m.method}
                for m in self._problem.cost_model.measurements(candidate.indices)
            },
            feasible=self._problem.feasible(candidate.indices),
            label=candidate.label,
            sampler_state=state,
        )

    def _take_up(self, stored: Trial) -> None:
        """Goes on with a stored trial."""
        self._used += stored.cost
        if stored.state.terminal:
            self._remember(stored)
        else:
            self._open[stored.number] = stored
            self._crew.begin(stored, None)

    def _wait(self) -> list[Trial]:
        """Those of the open trials that end next."""
        started = time.perf_counter()
        ended = self._crew.ended(self._job_id, self._open, self._look)
        for trial in ended:
            del self._open[trial.number]
            self._overhead["process_and_commit"].append(time.perf_counter() - started - (trial.seconds or 0.0))
            self._remember(trial)
        return ended

    def _remember(self, trial: Trial) -> None:
        self._done[trial.number] = trial
        if trial.number >= len(self._stored) or not self._stored[trial.number].state.terminal:
            self._told.append(trial.number)
            self._first_done = self._first_done or time.monotonic()
        self._look()
        self._report(self._phase)

    def _seconds_left(self) -> float | None:
        """At the pace of this process since its first evaluation; None before there is one."""
        fresh = sum(trial.cost for number, trial in self._done.items() if number > len(self._stored))
        if not fresh or self._first_done is None or self._used > self._budget:
            return None
        return max(0.0, (time.monotonic() - self._first_done) / fresh * (self._budget - self._used))

    def _look(self) -> None:
        """Renews the lease where it is time, and hears what the user of the job wants.

        Raises:
            Stopped: Not to go on.
            LeaseLost: Another process took over.
        """
        at = time.monotonic()
        if at - self._renewed > self._settings.lease_s / 3:
            self._store.renew_coordinator(self._job_id, self._fence, self._settings.lease_s)
            self._renewed = at
        if at - self._looked < min(_LOOK_S, self._settings.lease_s / 3):
            return
        self._looked = at
        orders = self._store.orders(self._job_id, self._fence)
        if orders.state in (JobState.PAUSED, JobState.CANCELLING, JobState.CANCELLED):
            raise Stopped(f"job {self._job_id} is {orders.state}")
        if orders.state is JobState.PENDING:  # paused and resumed since the last look
            self._begin()
        if orders.budget is not None:
            self._trials_wanted = int(orders.budget.get("trials", self._problem.trials))
            self._seconds_wanted = orders.budget.get("seconds")

    @property
    def _submitted(self) -> bool:
        """Whether workers elsewhere evaluate."""
        return self._crew.claims is None

    def _reap(self) -> None:
        """Ends claims of the dead; those of workers elsewhere the reaper does, which knows of outages."""
        if not self._submitted:
            self._store.reap()

    def _begin(self) -> None:
        """Has the job run. A submitted one that was paused this moment stays so; at a command line, to resume is to drive."""
        only_from = (JobState.PENDING, JobState.RUNNING) if self._submitted else tuple(JobState)
        try:
            self._store.set_job_state(self._job_id, self._fence, JobState.RUNNING, only_from=only_from)
        except Conflict as error:
            raise Stopped(str(error)) from None

    @property
    def _budget(self) -> float:
        """Evaluations that will be used."""
        changed = self._trials_wanted - self._problem.trials
        return self._subject.budget + changed if changed else self._subject.budget

    # Telling the user

    def _report(self, phase: str, done: int | None = None, total: int = 0, notice: str | None = None) -> None:
        now = time.monotonic()
        if phase == self._reported and notice is None and now < self._quiet_until:
            return
        self._reported = phase
        seconds, results = now - self._started, self._results()
        within = [t for t in results.within(self._problem.limits) if t.origin != "dense"]
        self._watch(
            Progress(
                phase=phase,
                done=len(self._done) if done is None else done,
                total=total,
                used=self._used,
                budget=self._budget,
                best=within[0].value(self._quality) if within else None,
                quality=self._quality,
                front=len(results.front()),
                failures=sum(t.failure is not None for t in self._done.values()),
                seconds=seconds,
                eta_s=self._seconds_left(),
                notice=notice,
            )
        )
        self._quiet_until = time.monotonic() + 50 * (time.monotonic() - now)  # however many trials: 2 % of the time
