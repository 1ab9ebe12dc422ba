"""What the page of a job says."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from autoeff.dashboard.outline import bests_over, bounds_of, dominated_over, dots_of, front_of, guests_of, pace_of, rivals_of, verdict

CREATED = "2026-01-02T12:00:00+00:00"


def job(**facts: Any) -> Any:
    return SimpleNamespace(**{"state": "running", "created": CREATED, "ended": None, "used": 25.0, "budget": 100} | facts)


def test_a_running_job_says_how_long_it_takes_yet() -> None:
    pace = pace_of(job(), datetime(2026, 1, 2, 12, 10, tzinfo=UTC))
    assert (pace.share, pace.elapsed_s, pace.left_s) == (0.25, 600.0, 1800.0)
    assert pace_of(job(state="paused"), datetime(2026, 1, 2, 12, 10, tzinfo=UTC)).left_s is None
    assert pace_of(job(used=0.0), datetime(2026, 1, 2, 12, 10, tzinfo=UTC)).left_s is None
    ended = pace_of(job(state="succeeded", ended="2026-01-02T12:01:00+00:00"), datetime(2026, 1, 3, tzinfo=UTC))
    assert (ended.share, ended.elapsed_s) == (1.0, 60.0)


def test_the_picture_holds_what_was_measured_on_the_whole_text(shown: Any, client: Any) -> None:
    rows = {row.trial: row for row in client.trials(shown.job.job)}
    tokens = max(row.measurements["kl"].tokens or 0 for row in rows.values() if "kl" in row.measurements)
    for dot in dots_of(shown):
        measured = rows[dot.trial].measurements
        assert (measured["kl"].tokens, measured["kl"].value, measured["avg_bits"].value) == (tokens, dot.quality, dot.cost)
    assert {dot.trial for dot in front_of(shown)} == {row.trial for row in shown.front.items}


def test_baselines_stand_beside_what_was_found(shown: Any) -> None:
    for snapshot in (shown, replace(shown, result=None)):  # at the end, and while it runs
        guests = guests_of(snapshot)
        assert {"dense", "uniform", "found"} <= {guest.role for guest in guests}
        assert {guest.label for guest in guests if guest.role == "uniform"} == set(shown.uniform.values())
    found = next(guest for guest in guests_of(shown) if guest.role == "found")
    assert (found.trial, found.quality) == (shown.front.best, shown.front.best_quality)


def test_limits_are_in_the_units_of_the_axes(shown: Any, ground: Any) -> None:
    assert bounds_of(shown, ground) == {"avg_bits": 3.5, "kv_bytes": float(ground.costs.dense("kv_bytes")) / 2}
    assert bounds_of(shown, None) == {}


def test_rivals_are_the_best_baselines_within_the_limits(shown: Any) -> None:
    rows = {row["role"]: row for row in shown.result["rows"] if row["feasible"]}
    assert rivals_of(shown) == {"additive optimum": rows["additive"]["search"], "best of random": rows["random"]["search"]}


def test_the_verdict_names_the_best_rival_and_the_uniform_level_that_costs_no_less(shown: Any) -> None:
    guests = {guest.label: guest for guest in guests_of(shown)}
    (rival, share), (label, saved) = verdict(shown)
    assert (rival, label) == ("the additive optimum", "bits=3 everywhere")
    assert share == pytest.approx(1 - shown.front.best_quality / rivals_of(shown)["additive optimum"])
    assert saved == pytest.approx(1 - shown.front.best_quality / guests["bits=3"].quality)
    assert guests["bits=3"].cost >= shown.best.measurements["avg_bits"].value
    assert verdict(replace(shown, front=shown.front.model_copy(update={"feasible": False}))) == []


def test_progress_over_time_ends_where_that_over_trials_does(shown: Any) -> None:
    for over in (bests_over, dominated_over):
        (timed, unit), (numbered, number) = over(shown, "time"), over(shown, "trials")
        assert timed[-1].value == pytest.approx(numbered[-1].value)
        assert (unit, number, 0 < timed[-1].at * 60 < 3600) == ("minutes", "trial", True)


def test_the_best_only_falls_and_the_dominated_share_only_rises(shown: Any) -> None:
    bests = [step.value for step in bests_over(shown, "trials")[0]]
    assert bests == sorted(bests, reverse=True)
    assert bests[-1] == min(point.y for point in shown.whole if point.feasible)
    shares = [step.value for step in dominated_over(shown, "trials")[0]]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1
