"""What a search must know of what it searches: a model from disk (`model`) or code of the user's own (`own`) alike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from autoeff.search.results import Results
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.search.settings import Settings
from autoeff.search.storage.records import Trial
from autoeff.search.worker import Runner

__all__ = ["Guests", "Subject"]

Guests = Generator[list[Candidate], Sequence[float | None], None]
"""Yields baselines in batches, and takes back the quality of each batch, in its order; None stands for a failure."""


class Subject(Protocol):
    """What is searched: the problem, its baselines, and who measures it."""

    @property
    def problem(self) -> Problem:
        """What the sampler is told."""

    @property
    def digest(self) -> str:
        """Names everything that values depend on besides the configuration: equal work is done once."""

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know, one line each."""

    @property
    def sampler(self) -> str | None:
        """Who proposes; None where nothing is proposed after the baselines."""

    @property
    def budget(self) -> float:
        """Evaluations that will be used, in full-token equivalents."""

    @property
    def seconds(self) -> float | None:
        """Wall time after which nothing more is proposed."""

    @property
    def held_out_windows(self) -> int:
        """Of the text on which finalists are confirmed; 0 where there is none."""

    def guests(self, runner: Runner | None) -> Guests:
        """The baselines; `runner` answers what must be known of the model to make them. None where others evaluate."""

    def runner(self, settings: Settings, log: Path, progress: Callable[[int, int], None]) -> Runner:
        """Who measures. `log` collects what it prints; `progress` hears (done, total) of what must be built first."""

    def beside_found(self, results: Results, trials: Sequence[Trial]) -> Sequence[Candidate]:
        """What is confirmed beside the found configuration, once it is known."""

    def closing(self, results: Results, trials: Sequence[Trial], runner: Runner | None) -> Mapping[str, Any]:
        """What the summary says besides the table and the front, which it may replace."""
