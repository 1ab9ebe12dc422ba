"""A new budget from what was measured: within the limits, near a fresh search, and harmless to the run."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from autoeff.errors import InputError, UnreachableLimit
from autoeff.search.limits import parse_limit
from autoeff.search.resolve import Resolver, resolve
from autoeff.search.results import Results, all_trials
from autoeff.search.runs import open_run
from autoeff.search.standing import problem_of
from autoeff.search.storage.records import JobState

TIGHT = "linear_bytes<=0.30x"  # the limit of the other run of the fixture `searched`


def test_measured_proposals_are_as_good_as_a_fresh_search(searched: Any) -> None:
    run = open_run(searched.tight, searched.settings)
    with run.store as store:
        problem = problem_of(store.job(run.job_id))
        fresh = Results(problem, all_trials(store, run.job_id)).within(problem.limits)[0].value("kl")
    assert fresh is not None
    found = resolve(searched.loose, [TIGHT], searched.settings, measure=True)
    assert found.answer == "measured"
    assert found.measured is not None
    # random weights leave a KL of some 1e-5, where neighbours differ by several per cent
    assert min(row["measurements"]["kl"]["value"] for row in found.proposals) <= 1.1 * fresh
    assert "kl_held_out" in found.measured["measurements"]


def test_measuring_adds_trials_and_changes_none(searched: Any) -> None:
    before = searched.rows(searched.loose)
    run = open_run(searched.loose, searched.settings)
    with run.store as store:
        result = store.job(run.job_id).result
        found = resolve(searched.loose, [TIGHT], searched.settings, measure=True)
        job = store.job(run.job_id)
    after = searched.rows(searched.loose)
    assert after[: len(before)] == before
    assert (job.state, job.result, job.coordinator) == (JobState.SUCCEEDED, result, None)
    added = [row for row in after[len(before) :] if "kl" in row["measurements"]]
    assert [row["trial"] for row in added] == [row["trial"] for row in found.proposals]
    assert {(row["origin"], row["label"]) for row in added} == {("given", TIGHT)}
    again = resolve(searched.loose, [TIGHT], searched.settings)
    assert again.measured is not None
    assert again.measured["measurements"]["kl"]["value"] == min(row["measurements"]["kl"]["value"] for row in found.proposals)


def test_a_prediction_keeps_the_limits_exactly_and_is_marked(searched: Any) -> None:
    found = resolve(searched.loose, [TIGHT, "kv_bytes<=0.7x"], searched.settings)
    run = open_run(searched.loose, searched.settings)
    with run.store as store:
        problem = problem_of(store.job(run.job_id))
    indices = problem.space.indices(found.predicted["configuration"])
    for text in (TIGHT, "kv_bytes<=0.7x"):
        limit = parse_limit(text, problem.cost_model)
        assert limit.met(problem.cost_model.exact(limit.name, indices))
    measured = found.predicted["measurements"]
    assert measured["linear_bytes"]["value"] == float(problem.cost_model.exact("linear_bytes", indices))
    assert {name: item["method"] for name, item in measured.items()} == dict.fromkeys(problem.cost_model.measures, "exact") | {
        "kl": "predicted"
    }
    assert found.predicted["digest"] == problem.space.at(indices).digest


def test_the_better_one_is_the_answer_only_beyond_doubt(searched: Any) -> None:
    found = resolve(searched.loose, [TIGHT], searched.settings)
    assert found.measured is not None
    expected, best = found.predicted["measurements"]["kl"], found.measured["measurements"]["kl"]["value"]
    surely = expected["value"] + 2 * expected["spread"] < best and "trial" not in found.predicted
    assert found.answer == ("predicted" if surely else "measured")
    assert f"{best:.4g}" in found.reason
    assert replace(found, answer="measured").chosen is found.measured


@pytest.mark.parametrize("text", ["linear_bytes<=0.35x", "linear_bytes<=0.32x", TIGHT, "linear_bytes<=0.25x"])
def test_nothing_measured_within_the_limits_is_better_than_what_is_predicted(searched: Any, text: str) -> None:
    run = open_run(searched.loose, searched.settings)
    with run.store as store:
        problem, trials = problem_of(store.job(run.job_id)), all_trials(store, run.job_id)
    limits = [parse_limit(text, problem.cost_model)]
    best = Results(problem, trials).within(limits)[0].value("kl")
    assert best is not None
    assert Resolver(problem, trials, limits).prediction().value <= 1.02 * best  # the model repeats what it learnt to a per cent or so


def test_a_running_search_answers_once_its_table_is_measured(searched: Any) -> None:
    run = open_run(searched.loose, searched.settings)
    with run.store as store:
        problem, trials = problem_of(store.job(run.job_id)), all_trials(store, run.job_id)
    limits = [parse_limit(TIGHT, problem.cost_model)]
    last = max(trial.number for trial in trials if trial.origin == "table")
    early = Resolver(problem, trials[: last + 1], limits).prediction()
    late = Resolver(problem, trials, limits).prediction()
    assert early.learnt_from < late.learnt_from
    with pytest.raises(InputError, match="damage table"):
        Resolver(problem, trials[:last], limits)


def test_without_evaluations_in_company_damages_add_up(searched: Any) -> None:
    run = open_run(searched.loose, searched.settings)
    with run.store as store:
        problem, trials = problem_of(store.job(run.job_id)), all_trials(store, run.job_id)
    table = [trial for trial in trials if trial.origin in ("dense", "table")]
    found = Resolver(problem, table, [parse_limit(TIGHT, problem.cost_model)]).prediction()
    alone = {trial.configuration.digest: trial.value("kl") for trial in table if trial.origin == "table"}
    damages = []
    for i, level in enumerate(found.indices):
        if level and problem.space.active(found.indices)[i]:
            damages.append(alone.get(problem.space.at([level if j == i else 0 for j in range(len(found.indices))]).digest))
    if None not in damages:  # levels that the cheap table leaves out are interpolated
        assert found.value == pytest.approx(sum(max(damage, 0.0) for damage in damages))  # float32 may leave a harmless level below 0
    assert found.learnt_from == 0
    assert found.deviation > 0


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ([], "--limit"),
        (["kl<=0.1"], "what is minimised"),
        (["beauty<=0.1x"], "'beauty'"),
        (["linear_bytes<0.1x"], "upper bound"),
    ],
)
def test_bad_limits_are_refused(searched: Any, limits: list[str], word: str) -> None:
    with pytest.raises(InputError, match=word):
        resolve(searched.loose, limits, searched.settings)


def test_an_unreachable_limit_names_the_least(searched: Any) -> None:
    with pytest.raises(UnreachableLimit, match=r"the least weight_bytes of this space is 0\.\d{4}x"):
        resolve(searched.loose, ["weight_bytes<=0.01x"], searched.settings)


def test_trials_are_not_added_to_a_search_that_goes_on(searched: Any) -> None:
    with sqlite3.connect(searched.settings.home / "autoeff.db") as database:
        database.execute("DROP TRIGGER job_update_is_final")  # the search has ended; one that goes on would take as long again
        database.execute("UPDATE job SET state = 'paused'")
    database.close()
    before = searched.rows(searched.loose)
    assert resolve(searched.loose, [TIGHT], searched.settings).predicted
    with pytest.raises(InputError, match="when it has ended"):
        resolve(searched.loose, [TIGHT], searched.settings, measure=True)
    assert searched.rows(searched.loose) == before


def test_an_answer_from_stored_measurements_loads_no_model_library() -> None:
    code = "import sys, autoeff.search.resolve; print(sorted({'torch', 'transformers', 'optuna', 'scipy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
