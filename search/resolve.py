"""A new budget answered from what a search has measured: no model is loaded, and it takes a second.

The damage table and every evaluation of the job condition the damage model of the `additive` sampler, near the damage that is to be
expected at the new budget; the model is minimised within the new limits. What it predicts stands beside the best configuration
that was measured within them. A minimum of predictions is an optimistic choice, so the rule is: the predicted configuration is
the answer only if its predicted quality plus twice the standard deviation of that prediction is better than the best measured
quality. Once proposals are measured too, predictions have no say: the answer is chosen as a search chooses, by the held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from autoeff.errors import InputError
from autoeff.search.allocators.dp import Allocator
from autoeff.search.guests import table_candidates
from autoeff.search.limits import Limit, check_reachable, parse_limit
from autoeff.search.own_job import refuse_own
from autoeff.search.results import Results, all_trials, rows_of
from autoeff.search.runs import open_run
from autoeff.search.samplers.damage_model import DamageModel, Form, Posterior
from autoeff.search.samplers.descent import minimised
from autoeff.search.samplers.evidence import Evaluation, Evidence, Indices
from autoeff.search.samplers.ledger import Ledger
from autoeff.search.samplers.neighbourhood import Neighbourhood
from autoeff.search.samplers.problem import Candidate, Problem, stream
from autoeff.search.sensitivity import known_table
from autoeff.search.settings import Settings
from autoeff.search.standing import problem_of
from autoeff.search.storage.records import Job, Trial
from autoeff.search.storage.store import Store
from autoeff.spaces.costs import CostModel
from autoeff.spaces.measurements import Measurement, Split

if TYPE_CHECKING:
    from autoeff.search.coordinator import Progress

__all__ = ["Prediction", "Resolution", "Resolver", "resolve"]

Watch = Callable[["Progress"], None]
Evaluate = Callable[[Candidate, Split], Trial]

_MEASURED = 24  # proposals of one `--measure`; each sees what those before it measured
_CONFIRMED = 4  # of the best within the limits, on the held-out text
_STARTS = 5  # best measured configurations to descend from, beside the table's optimum
_RADII = (1, 2)  # levels that a decision may move in one descent
_DESCENTS = 8  # from one start, while they gain
_ROUNDS = 2  # of choosing the evaluations to learn from by the damage that those before predicted
_DRAWS = 64  # of the posterior, for the deviation of a prediction
_SURE = 2.0  # deviations that a prediction must be better than what is measured
_WORK = 2**24  # of a budget grid


@dataclass(frozen=True)
class Prediction:
    """A configuration that nobody has to have measured.

    Attributes:
        indices: Its levels, normalised.
        value: Predicted quality on the search text.
        deviation: Standard deviation of that.
        learnt_from: Evaluations behind it, beside the damage table.
    """

    indices: Indices
    value: float
    deviation: float
    learnt_from: int


@dataclass(frozen=True)
class Resolution:
    """The answer for a budget.

    Attributes:
        quality: Name of the measurement that is minimised.
        answer: Which of the next two it is.
        predicted: The row of the configuration that the model expects to be best: exact costs, predicted quality; `trial` where it
            has been measured.
        measured: The row of the best one measured within the limits; None where there is none.
        proposals: Rows of the trials that this call added, in their order, each with what was `predicted`.
    """

    job_id: str
    quality: str
    limits: tuple[str, ...]
    answer: Literal["predicted", "measured"]
    predicted: dict[str, Any]
    measured: dict[str, Any] | None
    proposals: tuple[dict[str, Any], ...] = ()

    @property
    def chosen(self) -> dict[str, Any]:
        """The row that is the answer."""
        return self.measured if self.answer == "measured" and self.measured is not None else self.predicted

    @property
    def costs(self) -> tuple[str, ...]:
        """The cost measures worth a column: those of the limits, and the average bits."""
        return tuple(dict.fromkeys([*(text.partition("<=")[0].strip() for text in self.limits), "avg_bits"]))

    @property
    def reason(self) -> str:
        """The rule in one sentence, with its figures."""
        expected = self.predicted["measurements"][self.quality]
        bound = f"{expected['value']:.4g} + {_SURE:g} x {expected['spread']:.2g}"
        if self.measured is None:
            return f"predicted: nothing was measured within these limits; {self.quality} {bound} is expected"
        value = self.measured["measurements"][self.quality]["value"]
        if self.proposals:
            return f"measured: the best of everything measured within these limits, proposals included, {self.quality} {value:.4g}"
        if self.answer == "predicted":
            return f"predicted: {self.quality} {bound} is below the best measured, {value:.4g}"
        if "trial" in self.predicted:
            return f"measured: the configuration that is expected to be best is trial {self.predicted['trial']}, and measured"
        return f"measured: {self.quality} {value:.4g}; the prediction, {bound}, is not surely below it"

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job_id, "quality": self.quality, "limits": list(self.limits), "answer": self.answer, "reason": self.reason,
            "predicted": self.predicted, "measured": self.measured, "proposals": list(self.proposals),
        }  # fmt: skip


def resolve(
    run: str | Path, limits: Sequence[str], settings: Settings, *, measure: bool = False, watch: Watch = lambda progress: None
) -> Resolution:
    """The best configuration for a new budget, from the measurements of a finished or running search.

    Args:
        run: A run directory or a job id.
        limits: On costs, such as `linear_bytes<=0.22x`; they take the place of the job's.
        settings: Of this machine.
        measure: Evaluate up to 24 proposals on both texts with the job's model, and keep them as trials of the job, origin `given`.
        watch: Hears how that goes.

    Raises:
        InputError: No such run, a limit that cannot be read, a job whose damage table is not measured yet; with `measure`, a job that has
            not ended, or whose model, text or machine are no longer the same.
        UnreachableLimit: No configuration keeps the limits.
    """
    store, job_id, folder = open_run(run, settings)
    with store:
        job = store.job(job_id)
        refuse_own(job, "which has no stored costs to solve for; search again with other limits")
        problem = problem_of(job)
        asked = _limits(limits, problem.cost_model, problem.quality)
        trials = all_trials(store, job_id)
        resolver = Resolver(problem, trials, asked)
        first = resolver.prediction()
        proposed: list[tuple[int, Prediction]] = []
        if measure:
            from autoeff.search.run import adding  # the engine, which a prediction does without

            with adding(store, job, run, folder, settings, watch) as evaluate:
                proposed = _measured(resolver, asked, evaluate)
                _confirm(store, job, problem, asked, evaluate)
        return _resolution(store, job, problem, asked, first, proposed)


class Resolver:
    """Predicts within limits from the evaluations of a problem.

    Args:
        problem: As it was searched.
        trials: Of its job so far.
        limits: The new ones, reachable.

    Raises:
        InputError: The damage table is not measured yet.
    """

    def __init__(self, problem: Problem, trials: Sequence[Trial], limits: Sequence[Limit]) -> None:
        self.problem = problem
        table, _ = known_table(problem, trials)
        evaluations = [_evaluation(problem, trial) for trial in trials if trial.split == "search" and trial.state.terminal]
        self._singles = {c.indices for c in table_candidates(problem)}
        self._evidence = Evidence(problem, evaluations)
        self._model = DamageModel(problem.space, table.damage)
        self._ledger = Ledger(problem.space, problem.cost_model, limits)
        self._allocator = Allocator(problem.space, problem.cost_model, limits, work=_WORK)
        self._place = Neighbourhood(problem, self._model, limits)

    def tell(self, trial: Trial) -> None:
        """Learns from one more evaluation on the search text."""
        self._evidence.add([_evaluation(self.problem, trial)])

    def known(self, indices: Indices) -> bool:
        """Whether a configuration has been evaluated on the whole search text."""
        return indices in self._evidence.full

    def prediction(self) -> Prediction:
        """The configuration within the limits that is expected to be best."""
        start = self._allocator.solve(self._model.table(self._model.alone))
        if start is None:
            raise InputError("within these limits every configuration has a level that failed when it was measured alone; raise a limit")
        found = self._predicted(start, None)
        ranked = self._evidence.ranked(self._ledger.feasible)[:_STARTS]
        for _ in range(_ROUNDS):
            posterior = self._posterior(found.value)
            if posterior is None:
                break
            form = posterior[0].mean()
            ends = {self._descended(form, x) for x in (start, *ranked)}
            found = self._predicted(min(ends, key=lambda x: (form.value(self._model.features(x)), x)), posterior)
        return found

    def another(self, number: int) -> Prediction | None:
        """A configuration not evaluated yet that may well be better than it is expected to be; None where the limits leave none."""
        rng = stream(self.problem.seed, "resolve", number)
        found = next((x for x in self._place.proposals(self._evidence, rng, 1) if self._ledger.feasible(x)), None)
        return None if found is None else self._predicted(found, self._posterior(self.prediction().value))

    def _posterior(self, near: float) -> tuple[Posterior, int] | None:
        """The model conditioned on evaluations of damage `near` this, and their number; None where there are none."""
        full = self._evidence.full
        anchors = [x for x, value in full.items() if 0 < value < inf and x not in self._singles]
        if not anchors or near <= 0:
            return None
        anchor = min(anchors, key=lambda x: (abs(log(full[x] / near)), x))
        observations = self._evidence.observations(anchor)
        values, deviations = [o.value for o in observations], [o.deviation for o in observations]
        return self._model.posterior([o.indices for o in observations], values, full[anchor], deviations), len(observations)

    def _descended(self, form: Form, start: Indices) -> Indices:
        found, value = start, form.value(self._model.features(start))
        for descent in range(_DESCENTS):
            end = minimised(form, self._model, self._allocator, self._ledger, found, _RADII[descent % len(_RADII)])
            if (reached := form.value(self._model.features(end))) < value:
                found, value = end, reached
            elif descent:  # both radii were tried
                break
        return found

    def _predicted(self, indices: Indices, posterior: tuple[Posterior, int] | None) -> Prediction:
        z = self._model.features(indices)
        if posterior is None:  # the prior: damages add up
            return Prediction(indices, float(z @ self._model.alone), float(np.linalg.norm(z * self._model.own_deviation)), 0)
        rng = np.random.default_rng(0)
        drawn = [posterior[0].draw(rng).value(z) for _ in range(_DRAWS)]
        return Prediction(indices, posterior[0].mean().value(z), float(np.std(drawn)), posterior[1])


def _limits(texts: Sequence[str], cost_model: CostModel, quality: str) -> tuple[Limit, ...]:
    if not texts:
        raise InputError("name the new budget with --limit, for example --limit 'linear_bytes<=0.22x'")
    limits = tuple(parse_limit(text, cost_model, quality) for text in texts)
    for limit in limits:
        if limit.name == quality:
            raise InputError(f"limit {limit.text!r}: {quality} is what is minimised here; set limits on {', '.join(cost_model.measures)}")
    check_reachable(limits, cost_model)
    return limits


def _evaluation(problem: Problem, trial: Trial) -> Evaluation:
    value = trial.value(problem.quality)
    return Evaluation(problem.space.indices(trial.configuration.levels), trial.windows, inf if value is None else value)


def _measured(resolver: Resolver, limits: Sequence[Limit], evaluate: Evaluate) -> list[tuple[int, Prediction]]:
    """Measures proposals one after another, each chosen in the light of those before it; trial numbers and predictions."""
    problem, label = resolver.problem, ", ".join(limit.text for limit in limits)
    proposed: list[tuple[int, Prediction]] = []
    for number in range(_MEASURED):
        proposal: Prediction | None = resolver.prediction()
        if proposal is not None and resolver.known(proposal.indices):
            proposal = resolver.another(number)
        if proposal is None:
            break
        trial = evaluate(Candidate(proposal.indices, problem.windows, "given", label), "search")
        resolver.tell(trial)
        proposed.append((trial.number, proposal))
    return proposed


def _confirm(store: Store, job: Job, problem: Problem, limits: Sequence[Limit], evaluate: Evaluate) -> None:
    """Measures the best within the limits on the held-out text too, as a search does with its finalists."""
    windows = job.preflight["text"]["held_out"]["windows"]
    results = Results(_under(problem, limits), all_trials(store, job.id))
    for trial in results.within(limits)[:_CONFIRMED]:
        if trial.configuration.digest not in results.held_out:
            indices = problem.space.indices(trial.configuration.levels)
            evaluate(Candidate(indices, windows, trial.origin, f"held-out of trial {trial.number}"), "held_out")


def _under(problem: Problem, limits: Sequence[Limit]) -> Problem:
    return replace(problem, limits=tuple(limits))


def _resolution(
    store: Store, job: Job, problem: Problem, limits: Sequence[Limit], first: Prediction, proposed: Sequence[tuple[int, Prediction]]
) -> Resolution:
    rows = {row["trial"]: row for row in rows_of(store, job.id)}
    asked = _under(problem, limits)
    results = Results(asked, all_trials(store, job.id))
    predicted = _row(problem, first)
    known = results.full.get(predicted["digest"])
    if known is not None:
        predicted["trial"] = known.number
    best = results.found(asked.operating_points[0]) if proposed else next(iter(results.within(limits)), None)
    surely = best is None or (known is None and first.value + _SURE * first.deviation < results.quality(best))
    return Resolution(
        job_id=job.id,
        quality=problem.quality,
        limits=tuple(limit.text for limit in limits),
        answer="predicted" if surely and not (proposed and best is not None) else "measured",
        predicted=predicted,
        measured=None if best is None else rows[best.number],
        proposals=tuple(rows[number] | {"predicted": _row(problem, p)["measurements"][problem.quality]} for number, p in proposed),
    )


def _row(problem: Problem, prediction: Prediction) -> dict[str, Any]:
    """As the public row of a trial."""
    configuration = problem.space.at(prediction.indices)
    costs = problem.cost_model.measurements(prediction.indices)
    quality = Measurement(problem.quality, prediction.value, "search", spread=prediction.deviation, method="predicted")
    return {
        "digest": configuration.digest,
        "configuration": dict(configuration.levels),
        "learnt_from": prediction.learnt_from,
        "measurements": {m.name: m.to_json() for m in (*costs, quality)},
    }
