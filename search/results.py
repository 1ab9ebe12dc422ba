"""What a run amounts to: its public rows, its front, and the table at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

from autoeff.evaluators.correlation import spearman
from autoeff.search.guests import DamageTable
from autoeff.search.limits import Limit, feasible
from autoeff.search.pareto import non_dominated
from autoeff.search.samplers.problem import OperatingPoint, Problem
from autoeff.search.storage.records import Job, State, Trial
from autoeff.search.storage.store import Store
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.measurements import Split

__all__ = ["Results", "all_trials", "evaluation_key", "page_of", "rows_of"]


def evaluation_key(setup_digest: str, configuration_digest: str, split: Split, windows: int) -> str:
    """Names the work behind a trial: equal keys are equal work, of whatever job."""
    return digest_of([setup_digest, configuration_digest, split, windows])


def all_trials(store: Store, job_id: str) -> list[Trial]:
    """Every trial of a job, read in pages."""
    trials: list[Trial] = []
    while page := store.trials(job_id, after=trials[-1].number if trials else -1):
        trials += page
    return trials


def rows_of(store: Store, job_id: str) -> list[dict[str, Any]]:
    """The JSON row of every trial; what a configuration measured on held-out text stands in the rows of its search trials too."""
    trials = all_trials(store, job_id)
    return _rows(trials, trials)


def page_of(store: Store, job: Job, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The rows of some trials, as `rows_of` gives them, without reading the others."""
    text = job.preflight.get("text", {}).get("held_out")
    if text is None:  # own code has none
        return _rows(trials, ())
    windows = text["windows"]
    digests = dict.fromkeys(trial.configuration.digest for trial in trials)
    keys = [evaluation_key(job.setup_digest, digest, "held_out", windows) for digest in digests]
    return _rows(trials, store.of_keys(job.id, keys))


def _rows(trials: Iterable[Trial], confirmed: Iterable[Trial]) -> list[dict[str, Any]]:
    held_out = {t.configuration.digest: t for t in confirmed if t.split == "held_out" and t.state is State.SUCCEEDED}
    rows = []
    for trial in trials:
        row = trial.to_json()
        confirmation = held_out.get(trial.configuration.digest)
        if confirmation is not None and trial.split == "search":
            row["measurements"].update({m.name: m.to_json() for m in confirmation.measurements if m.split == "held_out"})
        rows.append(row)
    return rows


class Results:
    """Reads the outcome out of the trials of one problem.

    Args:
        problem: What was searched.
        trials: All of them so far.
    """

    def __init__(self, problem: Problem, trials: Iterable[Trial]) -> None:
        self.problem = problem
        self.full: dict[str, Trial] = {}
        self.held_out: dict[str, Trial] = {}
        self._beside: set[str] = set()  # confirmed after the found one was chosen, so they must not choose another
        for trial in trials:
            if trial.state is not State.SUCCEEDED:
                continue
            if trial.split == "held_out":
                if self.held_out.setdefault(trial.configuration.digest, trial) is trial and trial.origin == "alternative":
                    self._beside.add(trial.configuration.digest)
            elif trial.windows == problem.windows:
                self.full.setdefault(trial.configuration.digest, trial)

    def quality(self, trial: Trial) -> float:
        """The first objective, minimised, on the search text; infinity where there is none."""
        value = trial.value(self.problem.quality)
        if value is None:
            return inf
        return value if self.problem.quality == self.problem.objectives[0] else -value

    def held_out_quality(self, trial: Trial) -> float:
        """On the held-out text; infinity before it is confirmed."""
        confirmed = self.held_out.get(trial.configuration.digest)
        value = None if confirmed is None else confirmed.value(f"{self.problem.quality}_held_out")
        return inf if value is None else value

    def within(self, limits: Sequence[Limit]) -> list[Trial]:
        """Full-fidelity trials that keep the limits and the job's on quality, best first."""
        on_values = [limit for limit in (*limits, *self.problem.quality_limits) if limit.name not in self.problem.cost_model.measures]
        kept = [
            trial
            for trial in self.full.values()
            if feasible(limits, self.problem.cost_model, self.problem.space.indices(trial.configuration.levels))
            and all((value := trial.value(limit.name)) is not None and limit.met(value) for limit in on_values)
        ]
        return sorted(kept, key=lambda trial: (self.quality(trial), trial.number))

    def front(self) -> list[Trial]:
        """The non-dominated trials under the job's limits, by falling quality loss."""
        trials = self.within(self.problem.limits)
        values = [self.problem.values(self.problem.space.indices(t.configuration.levels), t.value) for t in trials]
        whole = [(trial, found) for trial, found in zip(trials, values, strict=True) if found is not None]
        return [whole[i][0] for i in non_dominated([found for _, found in whole])]

    def found(self, point: OperatingPoint) -> Trial | None:
        """The best configuration at a point, guests included: by the held-out text where confirmed, else by the search text."""

        def key(trial: Trial) -> tuple[float, float, int]:
            confirmed = trial.configuration.digest not in self._beside
            return self.held_out_quality(trial) if confirmed else inf, self.quality(trial), trial.number

        return min((trial for trial in self.within(point.limits) if self._keeps_accuracy(trial)), key=key, default=None)

    def accuracies(self, trial: Trial) -> dict[str, float]:
        """By measurement name; empty where the trial's configuration was asked no task."""
        confirmed = self.held_out.get(trial.configuration.digest)
        measurements = () if confirmed is None else confirmed.measurements
        return {m.name: m.value for m in measurements if m.name.startswith("accuracy:") and not m.own}

    def own_metrics(self, trial: Trial) -> dict[str, float]:
        """What the user's own functions said of the trial's model, by name; empty where it was not confirmed."""
        confirmed = self.held_out.get(trial.configuration.digest)
        return {} if confirmed is None else {m.name: m.value for m in confirmed.measurements if m.own}

    def _keeps_accuracy(self, trial: Trial) -> bool:
        """Whether it loses no more on any task than is allowed; what was asked no task does not."""
        if (allowed := self.problem.max_degradation) is None:
            return True
        dense = self.full.get(self.problem.space.dense_configuration.digest)
        wanted = {} if dense is None else self.accuracies(dense)
        own = self.accuracies(trial)
        return bool(wanted) and all(own.get(name, -inf) >= (1 - allowed) * value for name, value in wanted.items())

    def guests(self) -> list[tuple[str, str | None, Trial]]:
        """The baselines to compare with: (role, operating point, trial)."""
        found: list[tuple[str, str | None, Trial]] = [(t.origin, None, t) for t in self.full.values() if t.origin in ("dense", "uniform")]
        for point in self.problem.operating_points:
            within = self.within(point.limits)
            found += [("seed", point.name, trial) for trial in within if trial.origin == "seed"]
            for origin in ("additive", "random"):
                best = next((t for t in within if t.origin == origin), None)
                if best is not None:
                    found.append((origin, point.name, best))
        return found

    def additivity(self, table: DamageTable) -> dict[str, float] | None:
        """Spearman of predicted and true damage among candidates within 1.5 times the best at the first operating point."""
        trials = self.within(self.problem.operating_points[0].limits)
        good = [t for t in trials if self.quality(t) <= 1.5 * self.quality(trials[0])]
        if len(good) < 5:
            return None
        space = self.problem.space
        predicted = [table.predicted(space, space.indices(trial.configuration.levels)) for trial in good]
        return {"spearman": spearman(predicted, [self.quality(t) for t in good]), "n": len(good)}

    def summary(self) -> dict[str, Any]:
        """The end table and the front, as plain data."""
        points = self.problem.operating_points
        winners = [(point, self.found(point)) for point in points]
        rows = [self._row(role, point, trial) for role, point, trial in self.guests()]
        rows += [self._row("found", point.name, trial) for point, trial in winners if trial is not None]
        first = winners[0][1] if winners else None
        return {
            "quality": self.problem.quality,
            "objectives": list(self.problem.objectives),
            "limits": [limit.text for limit in self.problem.limits],
            "state": "infeasible" if first is None else "feasible",
            "rows": rows,
            "front": [trial.number for trial in self.front()],
            "found": None if first is None else first.number,
            "closest": None if first is not None else self._closest(),
        }

    def _row(self, role: str, point: str | None, trial: Trial) -> dict[str, Any]:
        confirmed = self.held_out.get(trial.configuration.digest)
        label = trial.label if role in ("uniform", "seed") else None
        row: dict[str, Any] = {"role": role, "label": label, "trial": trial.number, "point": point}
        row["feasible"] = trial.feasible and self.problem.violation(trial.value) == 0
        row["origin"] = trial.origin
        row["costs"] = {m.name: m.value for m in trial.measurements if m.is_cost or (m.own and m.name != self.problem.quality)}
        row["search"] = trial.value(self.problem.quality)
        names = {"held_out": f"{self.problem.quality}_held_out"}
        for key in ("held_out", "perplexity_held_out", "spearman_held_out", "passkey_accuracy"):
            row[key] = None if confirmed is None else confirmed.value(names.get(key, key))
        return row | self.accuracies(trial) | {"metrics": self.own_metrics(trial)}

    def _closest(self) -> int | None:
        """The evaluated trial nearest to the limits on measured values among those that keep the ones on costs."""
        kept = [t for t in self.full.values() if t.feasible]
        return min(kept, key=lambda t: (self.problem.violation(t.value), self.quality(t), t.number)).number if kept else None

    def damage(self, table: DamageTable) -> dict[str, dict[str, float | None]]:
        """The table by decision key and level; None where the level alone fails."""
        return {
            decision.key: {str(level): value if value < inf else None for level, value in zip(decision.levels, row, strict=True)}
            for decision, row in zip(self.problem.space.decisions, table.damage, strict=True)
        }
