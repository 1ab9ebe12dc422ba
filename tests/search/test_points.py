"""Points of pictures, and standings that are kept up: against reading everything."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoeff.errors import InputError
from autoeff.search.points import evenly, points_of
from autoeff.search.results import Results, all_trials
from autoeff.search.standing import Tally, problem_of, standing_of
from autoeff.search.storage import Job, Store
from autoeff.search.storage.scan import Scan


@given(st.integers(0, 5000), st.integers(0, 300))
def test_one_of_each_stretch_is_drawn_and_stays_as_a_job_grows(total: int, room: int) -> None:
    drawn = evenly(total, room)
    assert len(drawn) <= room
    assert drawn == sorted(set(drawn))
    if room == 0:
        return
    assert len(drawn) == total or 2 * len(drawn) > room
    length = 1
    while -(-total // length) > room:
        length *= 2
    assert [number // length for number in drawn] == list(range(-(-total // length)))
    assert all(0 <= number < total for number in drawn)
    later = evenly(3 * total, room)
    assert {number for number in later if number < total - 4 * length} <= set(drawn)


@pytest.fixture
def going_on(searched: Any) -> Any:
    """A finished search as it was before it was summed up."""
    with searched.opened() as store:
        job = store.jobs()[0]
        yield store, replace(job, result=None)


def test_a_standing_that_is_kept_up_is_that_of_all_trials(going_on: tuple[Store, Job]) -> None:
    store, job = going_on
    trials = all_trials(store, job.id)
    results = Results(problem_of(job), trials)
    best = results.within(results.problem.limits)[0]
    standing = standing_of(store, job)
    assert standing.front == tuple(trial.number for trial in results.front())
    assert (standing.best, standing.best_quality, standing.feasible) == (best.number, best.value(results.problem.quality), True)
    numbers = [trial.number for trial in trials] * 2
    random.Random(0).shuffle(numbers)
    tally = Tally(store, job)
    assert tally.standing.best is None
    for at in range(0, len(numbers), 7):
        tally.read(numbers[at : at + 7])
    assert tally.standing == standing


def test_points_are_the_trials_where_there_is_room(going_on: tuple[Store, Job]) -> None:
    store, job = going_on
    rows = {trial.number: trial for trial in all_trials(store, job.id) if trial.split == "search"}
    standing = standing_of(store, job)
    points = points_of(store, job, standing, "linear_bytes", "kl", 5000)
    assert [point.trial for point in points] == sorted(rows)
    for point in points:
        trial = rows[point.trial]
        assert (point.x, point.y) == (trial.value("linear_bytes"), trial.value("kl"))
        assert (point.origin, point.state, point.windows) == (trial.origin, trial.state, trial.windows)
        assert point.front is (point.trial in standing.front)
        ended = trial.ended_at
        assert point.seconds == (None if ended is None else max(0.0, (ended - job.created_at).total_seconds()))


def test_front_and_baselines_stay_when_points_are_thinned(going_on: tuple[Store, Job]) -> None:
    store, job = going_on
    every = points_of(store, job, standing_of(store, job), "trial", "kl", 5000)
    kept = {point.trial for point in every if point.front or point.origin not in ("searched", "table")}
    room = len(kept) + 8
    assert room < len(every), "the search is long enough to be thinned"
    points = points_of(store, job, standing_of(store, job), "trial", "kl", room)
    assert len(points) <= room
    assert kept <= {point.trial for point in points}
    assert {point.origin for point in points} == {point.origin for point in every}
    assert set(points) < set(every)
    assert len(points_of(store, job, standing_of(store, job), "trial", "kl", 3)) <= 3


def test_what_was_confirmed_is_a_value_of_the_search_trial(going_on: tuple[Store, Job]) -> None:
    store, job = going_on
    trials = all_trials(store, job.id)
    searched = {t.configuration.digest for t in trials if t.split == "search"}
    confirmed = {
        t.configuration.digest: t.value("kl_held_out") for t in trials if t.split == "held_out" and t.configuration.digest in searched
    }
    assert len(confirmed) > 3
    points = points_of(store, job, standing_of(store, job), "kl", "kl_held_out", 5000)
    assert {store.trial(job.id, p.trial).configuration.digest for p in points if p.y is not None} == set(confirmed)
    for point in points:
        assert point.y == confirmed.get(store.trial(job.id, point.trial).configuration.digest)
    with pytest.raises(InputError, match="no trial of job .* has a measurement 'nothing'"):
        points_of(store, job, standing_of(store, job), "kl", "nothing", 100)


def test_a_scan_reads_in_pages_what_is_asked(going_on: tuple[Store, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    store, job = going_on
    whole = list(Scan(store.database, job.id, ["kl"]).all(job.counts.trials))
    monkeypatch.setattr("autoeff.search.storage.scan._PAGE", 7)
    scan = Scan(store.database, job.id, ["kl"])
    assert list(scan.all(job.counts.trials)) == whole
    assert scan.of(range(job.counts.trials)) == whole
    baselines = [brief.number for brief in whole if brief.origin in ("random", "dense") and brief.split == "search"]
    assert (scan.numbers(["random", "dense"], 3), scan.numbers(["random", "dense"], 999)) == (baselines[:3], baselines)
