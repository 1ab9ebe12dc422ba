"""What a search has evaluated so far, at two fidelities, and what is left of its budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, inf, log, sqrt

from autoeff.search.guests import table_candidates
from autoeff.search.samplers.problem import Problem

__all__ = ["Evaluation", "Evidence", "Observation"]

_LEAST, _WIDE = 0.25, 2.5  # times the best value: what is far better or worse tells nothing of levels in company near it
_DEVIATION = 0.03  # of a few-window value from its full one, relative: measured .02 to .05 on small Llamas
_PAIRS = 16  # of values at both fidelities, the closest to the best one
_DOUBT = 4.0  # pairs of values that this belief is worth

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """What became of a candidate; the value is infinite where it failed."""

    indices: Indices
    windows: int
    value: float


@dataclass(frozen=True)
class Observation:
    """A value for the damage model to learn from.

    Attributes:
        value: Damage; of a cheap evaluation, what it is expected to be on all windows.
        deviation: Standard deviation of that expectation; 0 on all windows.
    """

    indices: Indices
    value: float
    deviation: float


class Evidence:
    """Every evaluation of a search. The order in which those of one step came does not matter.

    Attributes:
        full: Value on all windows by level indices.
        few: Value on few windows, of proposals (not of the damage table).
        left: Budget left, in windows.
    """

    def __init__(self, problem: Problem, guests: Iterable[Evaluation]) -> None:
        self._problem = problem
        self._alone = {candidate.indices for candidate in table_candidates(problem)}
        self.full: dict[Indices, float] = {}
        self.few: dict[Indices, float] = {}
        self.left = problem.trials * problem.windows
        self._seen: set[tuple[Indices, int]] = set()
        self.add(guests)

    def add(self, evaluations: Iterable[Evaluation]) -> None:
        """Notes evaluations; a repeated one costs nothing."""
        for e in evaluations:
            if (e.indices, e.windows) in self._seen:
                continue
            self._seen.add((e.indices, e.windows))
            self.left -= e.windows
            if e.windows == self._problem.windows:
                self.full[e.indices] = e.value
            elif e.windows == self._problem.few_windows and e.indices not in self._alone:
                self.few[e.indices] = e.value

    def ranked(self, feasible: Callable[[Indices], bool]) -> list[Indices]:
        """The configurations that have a value on all windows, the best first."""
        return [x for v, x in sorted((v, x) for x, v in self.full.items() if v < inf) if feasible(x)]

    def observations(self, best: Indices) -> list[Observation]:
        """What is worth learning from around `best`, in an order of its own."""
        at = self.full[best]
        ratio, deviation = self._conversion(best)
        found = [Observation(x, v, 0.0) for x, v in self.full.items()]
        found += [Observation(x, v * ratio, deviation * at) for x, v in self.few.items() if x not in self.full]
        near = (o for o in found if _LEAST * at <= o.value <= _WIDE * at and (o.indices == best or o.indices not in self._alone))
        return sorted(near, key=lambda o: (o.value, o.indices))

    def _conversion(self, best: Indices) -> tuple[float, float]:
        """Full-window over few-window value near `best`, and the relative deviation from that."""
        at = self.full[best]
        both = [(self.full[x], v) for x, v in self.few.items() if 0 < v < inf and 0 < self.full.get(x, 0.0) < inf]
        logs = [log(full / few) for full, few in sorted(both, key=lambda pair: (abs(log(pair[0] / at)), pair))[:_PAIRS]]
        if not logs:
            return 1.0, 5 * _DEVIATION  # nothing says how hard the few windows are
        mean = sum(logs) / len(logs)
        spread = sum((item - mean) ** 2 for item in logs)
        return exp(mean), sqrt((spread + _DOUBT * _DEVIATION**2) / (len(logs) + _DOUBT))
