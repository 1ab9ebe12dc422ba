"""Jobs, coordinators, proposals and reading; the life of an evaluation is in test_leases.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event
from sqlalchemy.exc import IntegrityError

from autoeff.errors import FailureClass, InputError, LeaseLost
from autoeff.search.storage import Counts, Failure, JobState, Proposal, State, Store, Trial, TrialRef
from autoeff.search.storage.rows import measurement_of, values_of
from autoeff.search.storage.scan import Scan
from autoeff.search.storage.tables import MeasurementRow
from autoeff.spaces.configuration import Configuration, digest_of
from autoeff.spaces.measurements import MEASURES, Measurement

Make = Callable[..., Proposal]
JobAndFence = tuple[str, int]

KL = Measurement("kl", 0.25, "search", 2048, 0.01)


def run(store: Store, job: JobAndFence, proposal: Proposal, me: str) -> TrialRef:
    ref = store.propose(*job, proposal, claim_for=me, ttl_s=60)
    assert ref.claim is not None
    assert store.complete(ref.claim, [KL], 0.5)
    return ref


def second_job(store: Store, me: str) -> JobAndFence:
    store.create_job("second", {}, {}, {}, "1" * 64)
    return "second", store.acquire_coordinator("second", me, 60)


class TestJobs:
    def test_job_comes_back_as_created(self, store: Store) -> None:
        store.create_job("j1", {"model": "demo", "seed": 0}, {"least": 1.5}, {"decisions": [1]}, "a" * 64)
        job = store.job("j1")
        assert (job.spec, job.preflight, job.space) == ({"model": "demo", "seed": 0}, {"least": 1.5}, {"decisions": [1]})
        assert (job.setup_digest, job.state, job.result, job.coordinator) == ("a" * 64, JobState.PENDING, None, None)
        assert job.counts == Counts(0, 0, 0, 0, 0.0)

    def test_a_spec_keeps_its_order(self, store: Store) -> None:
        """Of several globs the last one holds."""
        store.create_job("j1", {"space": {"levels": {"*:bits": [8], "*.down_proj:bits": [4]}}}, {}, {}, "")
        assert list(store.job("j1").spec["space"]["levels"]) == ["*:bits", "*.down_proj:bits"]

    def test_times_are_utc_from_the_database(self, store: Store) -> None:
        store.create_job("j1", {}, {}, {}, "")
        created = store.job("j1").created_at
        assert created.tzinfo is UTC
        assert abs(datetime.now(UTC) - created) < timedelta(seconds=5)

    def test_id_is_taken_once(self, store: Store) -> None:
        store.create_job("j1", {"seed": 1}, {}, {}, "")
        with pytest.raises(InputError, match="'j1' exists already"):
            store.create_job("j1", {"seed": 2}, {}, {}, "")
        assert store.job("j1").spec == {"seed": 1}

    def test_unknown_job_is_named(self, store: Store) -> None:
        calls = (store.job, store.counts, lambda job: store.acquire_coordinator(job, "me", 1), lambda job: store.mark_told(job, 1, []))
        for call in calls:
            with pytest.raises(InputError, match="no job 'nope'"):
                call("nope")

    def test_jobs_come_in_pages_the_newest_first(self, store: Store) -> None:
        ids = [f"j{i}" for i in range(7)]
        for job_id in ids:
            store.create_job(job_id, {}, {}, {}, "")
        with store._database.write() as connection:  # three of the same instant
            connection.exec_driver_sql("UPDATE job SET created_at = 1000.0 WHERE id IN ('j0', 'j1', 'j2')")
        seen: list[str] = []
        while page := store.jobs(limit=2, before=seen[-1] if seen else None):
            seen += [job.id for job in page]
        assert seen == ids[::-1]

    def test_result_stays_until_replaced(self, store: Store, job: JobAndFence) -> None:
        store.set_job_state(*job, JobState.RUNNING, {"best": 1})
        store.set_job_state(*job, JobState.SUCCEEDED)
        assert (store.job("job").state, store.job("job").result) == (JobState.SUCCEEDED, {"best": 1})
        assert store.job("job").ended_at is not None

    def test_resumed_job_has_not_ended(self, store: Store, job: JobAndFence) -> None:
        for state in (JobState.RUNNING, JobState.FAILED, JobState.RUNNING):
            store.set_job_state(*job, state)
        assert store.job("job").ended_at is None

    @pytest.mark.parametrize("end", [JobState.SUCCEEDED, JobState.CANCELLED])
    def test_ended_job_does_not_run_again(self, store: Store, job: JobAndFence, end: JobState) -> None:
        store.set_job_state(*job, JobState.RUNNING)
        store.set_job_state(*job, end)
        store.set_job_state(*job, end, {"again": True})
        with pytest.raises(InputError, match=f"is {end} and cannot become running"):
            store.set_job_state(*job, JobState.RUNNING)


class TestCoordinator:
    def test_one_process_drives_a_job(self, store: Store, job: JobAndFence, me: str) -> None:
        assert store.job("job").coordinator == me
        with pytest.raises(InputError, match=f"driven by the process {me}"):
            store.acquire_coordinator("job", "other", 60)

    def test_expired_lease_is_taken_over_and_the_former_holder_shut_out(self, store: Store, me: str, proposal: Make) -> None:
        store.create_job("job", {}, {}, {}, "")
        stale = store.acquire_coordinator("job", me, 0)
        store.propose("job", stale, proposal(0))  # nobody took over yet
        assert store.job("job").coordinator is None
        fence = store.acquire_coordinator("job", "other", 60)
        assert fence > stale
        writes: list[Callable[[], object]] = [
            lambda: store.propose("job", stale, proposal(1)),
            lambda: store.set_job_state("job", stale, JobState.RUNNING),
            lambda: store.renew_coordinator("job", stale, 60),
            lambda: store.mark_told("job", stale, [0]),
        ]
        for write in writes:
            with pytest.raises(LeaseLost, match="but by other"):
                write()
        store.release_coordinator("job", stale)
        assert store.job("job").coordinator == "other"
        assert (store.job("job").state, store.counts("job").trials) == (JobState.PENDING, 1)

    def test_renewed_lease_lives(self, store: Store, me: str) -> None:
        store.create_job("job", {}, {}, {}, "")
        fence = store.acquire_coordinator("job", me, 0)
        store.renew_coordinator("job", fence, 60)
        with pytest.raises(InputError, match="driven by"):
            store.acquire_coordinator("job", "other", 60)

    def test_released_job_is_free_and_its_fence_void(self, store: Store, job: JobAndFence, me: str, proposal: Make) -> None:
        store.release_coordinator(*job)
        with pytest.raises(LeaseLost, match="but by none"):
            store.propose(*job, proposal(0))
        assert store.acquire_coordinator("job", me, 60) > job[1]

    def test_job_and_work_of_a_killed_process_are_taken_over_at_once(self, store: Store, url: str, me: str, proposal: Make) -> None:
        code = f"""
from autoeff.search.storage import Proposal, Store, process_identity
from autoeff.spaces.configuration import Configuration
store, me = Store.open({url!r}), process_identity()
store.create_job("job", {{}}, {{}}, {{}}, "")
fence = store.acquire_coordinator("job", me, 3600)
store.propose("job", fence, Proposal(0, Configuration({{}}), "given", "search", 1, 1.0, "k", {{}}, True), claim_for=me, ttl_s=3600)
print(me, flush=True)
input()
"""
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            holder = child.stdout.readline().strip()
            assert store.job("job").coordinator == holder
            assert store.reap() == 0
            child.send_signal(signal.SIGKILL)
        assert store.job("job").coordinator is None
        fence = store.acquire_coordinator("job", me, 60)
        assert store.reap() == 1
        (trial,) = store.trials("job")
        assert (trial.state, trial.attempts) == (State.QUEUED, 1)
        assert store.claim(trial.evaluation_id, me, 60) is not None
        store.propose("job", fence, proposal(1))


class TestProposing:
    def test_numbers_are_dense(self, store: Store, job: JobAndFence, proposal: Make) -> None:
        for number in (1, -1):
            with pytest.raises(ValueError, match="dense"):
                store.propose(*job, proposal(number))
        store.propose(*job, proposal(0))
        with pytest.raises(ValueError, match="0 cannot follow 1"):
            store.propose(*job, proposal(0))

    def test_proposal_and_claim_are_one_transaction(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        ref = store.propose(*job, proposal(0), claim_for=me, ttl_s=60)
        assert ref.claim is not None
        assert (ref.state, ref.claim.attempt, ref.claim.worker) == (State.RUNNING, 1, me)
        assert (ref.claim.configuration, ref.claim.split, ref.claim.windows) == (proposal(0).configuration, "search", 16)
        assert store.claim(ref.evaluation_id, me, 60) is None

    def test_equal_work_is_done_once_in_a_job_and_paid_once(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        first = run(store, job, proposal(0, "same", cost=0.5), me)
        again = store.propose(*job, proposal(1, "same", cost=0.5), claim_for=me, ttl_s=60)
        assert again == TrialRef(1, first.evaluation_id, State.SUCCEEDED, None)
        assert store.trial("job", 1).value("kl") == 0.25
        assert [trial.cost for trial in store.trials("job")] == [0.5, 0.0]
        assert store.counts("job") == Counts(2, 2, 0, 0, 0.5)

    def test_other_jobs_result_is_reused_but_paid(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        first = run(store, job, proposal(0, "same"), me)
        other = second_job(store, me)
        assert store.propose(*other, proposal(0, "same")).evaluation_id == first.evaluation_id
        assert store.counts("second") == Counts(1, 1, 0, 0, 1.0)  # else what a search asks would depend on earlier ones

    @pytest.mark.parametrize("end", [State.FAILED, State.QUARANTINED])
    def test_failure_is_kept_within_the_job_and_tried_again_by_another(
        self, store: Store, job: JobAndFence, proposal: Make, me: str, end: State
    ) -> None:
        ref = store.propose(*job, proposal(0, "same"))
        for _ in range(3):
            claim = store.claim(ref.evaluation_id, me, 60)
            if claim is not None and end is State.FAILED:
                store.fail(claim, FailureClass.NAN, "kl is nan")
            elif claim is not None:
                store.lost(claim, "gone")
        assert store.propose(*job, proposal(1, "same"), claim_for=me, ttl_s=60) == TrialRef(1, ref.evaluation_id, end, None)
        other = second_job(store, me)
        fresh = store.propose(*other, proposal(0, "same"), claim_for=me, ttl_s=60)
        assert fresh.evaluation_id != ref.evaluation_id
        assert fresh.claim is not None
        store.complete(fresh.claim, [KL], 0.1)
        assert store.propose(*job, proposal(2, "same")).state is end  # what a job has seen, it keeps seeing

    def test_jobs_share_running_work_and_all_hear_of_its_end(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        ref = store.propose(*job, proposal(0, "same"), claim_for=me, ttl_s=60)
        other = second_job(store, me)
        shared = store.propose(*other, proposal(0, "same"), claim_for="other", ttl_s=60)
        assert shared == TrialRef(0, ref.evaluation_id, State.RUNNING, None)
        assert ref.claim is not None
        store.complete(ref.claim, [KL], 0.1)
        for job_id in ("job", "second"):
            assert [trial.number for trial in store.untold(job_id)] == [0]
            assert store.counts(job_id).succeeded == 1
            assert store.events(job_id)[-1].kind == "trial.succeeded"

    def test_same_number_in_two_jobs_is_two_trials(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        other = second_job(store, me)
        store.propose(*job, proposal(0, "mine", label="mine"))
        store.propose(*other, proposal(0, "theirs", label="theirs"))
        assert [trial.label for trial in store.trials("job")] == ["mine"]
        assert [trial.label for trial in store.trials("second")] == ["theirs"]


class TestTelling:
    def test_finished_trials_are_told_in_the_order_of_their_ends(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        refs = [store.propose(*job, proposal(number), claim_for=me, ttl_s=60) for number in range(4)]
        for number in (2, 0, 3):
            claim = refs[number].claim
            assert claim is not None
            store.complete(claim, [KL], 0.1)
            time.sleep(0.005)  # the database's clock has milliseconds
        assert [trial.number for trial in store.untold("job")] == [2, 0, 3]
        assert [trial.number for trial in store.trials("job") if not trial.state.terminal] == [1]

    def test_told_trials_are_not_told_again(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        for number in range(3):
            run(store, job, proposal(number), me)
        store.mark_told(*job, [1])
        assert [trial.number for trial in store.untold("job")] == [0, 2]
        store.propose(*job, proposal(3), told=[0, 2])
        assert store.untold("job") == []
        assert [trial.told for trial in store.trials("job")] == [True, True, True, False]

    def test_each_job_is_told_by_itself(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        other = second_job(store, me)
        for one in (job, other):
            run(store, one, proposal(0, one), me)
        store.mark_told(*other, [0])
        assert [trial.told for name in ("job", "second") for trial in store.trials(name)] == [False, True]


class TestReading:
    def test_trial_comes_back_whole(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        asked = proposal(0, label="bits=2", origin="uniform", feasible=False, sampler_state={"generation": 3}, split="held_out", windows=4)
        run(store, job, asked, me)
        trial = store.trial("job", 0)
        assert trial.configuration == asked.configuration
        assert (trial.label, trial.origin, trial.feasible, trial.sampler_state) == ("bits=2", "uniform", False, {"generation": 3})
        assert (trial.split, trial.windows, trial.cost, trial.seconds, trial.attempts) == ("held_out", 4, 1.0, 0.5, 1)
        assert trial.measurements == (
            Measurement("avg_bits", 3.25, method="exact"),
            Measurement("linear_bytes", 4096.0, method="exact"),
            KL,
        )
        assert (trial.failure, trial.told) == (None, False)

    def test_public_row_is_the_documented_one(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        run(store, job, proposal(0, label="bits=2"), me)
        assert json.loads(json.dumps(store.trial("job", 0).to_json())) == {
            "trial": 0,
            "digest": proposal(0).configuration.digest,
            "origin": "searched",
            "state": "succeeded",
            "label": "bits=2",
            "configuration": {"a:bits": 2, "b:skip": "none"},
            "measurements": {
                "avg_bits": {"value": 3.25, "unit": "bits/weight", "method": "exact"},
                "linear_bytes": {"value": 4096.0, "unit": "bytes", "method": "exact"},
                "kl": {"value": 0.25, "unit": "nats/token", "split": "search", "tokens": 2048, "spread": 0.01, "method": "measured"},
            },
        }

    def test_failure_is_in_the_public_row(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        claim = store.propose(*job, proposal(0), claim_for=me, ttl_s=60).claim
        assert claim is not None
        store.fail(claim, FailureClass.OOM_HOST, "killed at 2 GiB", "a log", {"rss": 2**31}, seconds=1.5)
        trial = store.trial("job", 0)
        assert trial.failure == Failure(FailureClass.OOM_HOST, "killed at 2 GiB")
        assert trial.to_json()["failure"] == {"class": "oom_host", "message": "killed at 2 GiB"}
        assert "label" not in trial.to_json()
        assert (trial.seconds, trial.value("kl"), trial.value("avg_bits")) == (1.5, None, 3.25)

    def test_trials_come_in_pages_by_number(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        for number in range(7):
            run(store, job, proposal(number), me)
        pages: list[list[Trial]] = []
        while page := store.trials("job", after=pages[-1][-1].number if pages else -1, limit=3):
            pages.append(page)
        assert [[trial.number for trial in page] for page in pages] == [[0, 1, 2], [3, 4, 5], [6]]
        assert all(trial.value("kl") == 0.25 for page in pages for trial in page)

    def test_absent_trial_is_named(self, store: Store, job: JobAndFence, proposal: Make) -> None:
        store.propose(*job, proposal(0))
        with pytest.raises(InputError, match="'job' has no trial 1; it has 1, counted from 0"):
            store.trial("job", 1)
        with pytest.raises(InputError, match="no job 'nope'"):
            store.trial("nope", 0)

    def test_events_tell_the_story_without_gaps(self, store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
        store.set_job_state(*job, JobState.RUNNING)
        run(store, job, proposal(0, "same"), me)
        store.propose(*job, proposal(1, "same"))
        claim = store.propose(*job, proposal(2), claim_for=me, ttl_s=60).claim
        assert claim is not None
        store.lost(claim, "the machine went down")
        store.set_job_state(*job, JobState.PAUSED)
        events = store.events("job")
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [(event.kind, event.body.get("trial")) for event in events] == [
            ("job.created", None),
            ("job.coordinator", None),
            ("job.running", None),
            ("trial.proposed", 0),
            ("trial.running", 0),
            ("trial.succeeded", 0),
            ("trial.proposed", 1),
            ("trial.succeeded", 1),
            ("trial.proposed", 2),
            ("trial.running", 2),
            ("trial.queued", 2),
            ("job.paused", None),
        ]
        assert [event.seq for event in store.events("job", after=4, limit=3)] == [5, 6, 7]

    @pytest.mark.parametrize("statement", ["UPDATE event SET kind = 'x'", "DELETE FROM event"])
    def test_history_cannot_be_rewritten(self, store: Store, job: JobAndFence, statement: str) -> None:
        with pytest.raises(IntegrityError, match="event is final"), store._database.write() as connection:
            connection.exec_driver_sql(statement)


levels = st.dictionaries(
    st.text(max_size=8), st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)


@given(levels)
@settings(max_examples=50)
def test_configuration_survives_its_canonical_text(levels: dict[str, int | float | str]) -> None:
    made = Configuration(levels)
    back = Configuration(json.loads(made.canonical))
    assert back.digest == made.digest == digest_of(levels)


values = st.floats(allow_nan=False, allow_infinity=False)
measurements = st.builds(
    Measurement,
    st.sampled_from(sorted(MEASURES)),
    values,
    st.sampled_from(["search", "held_out", None]),
    st.none() | st.integers(1, 2**31 - 1),
    st.none() | values,
    st.sampled_from(["mean", "median"]),
    st.sampled_from(["exact", "measured", "predicted", "estimated"]),
    st.none() | st.just("cpu"),
)


@given(measurements)
@settings(max_examples=50)
def test_measurement_survives_its_row(item: Measurement) -> None:
    row = values_of(1, item)
    assert set(row) == {column.name for column in MeasurementRow.__table__.columns}
    assert measurement_of(type("Row", (), row)()) == item


def test_looking_up_some_trials_does_not_go_through_all_of_a_job(store: Store, job: JobAndFence, proposal: Make, me: str) -> None:
    if store.database.name.startswith("postgresql"):
        return  # which knows its tables' sizes and plans by them
    refs = [run(store, job, proposal(n), me) for n in range(3)]
    asked: list[tuple[str, Any]] = []

    def note(connection: object, cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if "trial" in statement:
            asked.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        keys = [proposal(n).eval_key for n in range(3)]
        assert [trial.evaluation_id for trial in store.of_keys("job", keys)] == [ref.evaluation_id for ref in refs]
        assert [brief.number for brief in Scan(store.database, "job", ["kl"]).of_keys(keys)] == [0, 1, 2]
        assert store.trials("job", 0, 5, states=[State.FAILED, State.QUEUED]) == []
        assert Scan(store.database, "job", []).numbers(["searched"], 9) == [0, 1, 2]
        assert [trial.number for trial in store.trials("job", 0, origin="searched")] == [1, 2]
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(asked) == 5
    with store.database.read() as connection:
        for statement, parameters in asked:
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            assert not any("sqlite_autoindex_trial_1" in step or step.startswith("SCAN") for step in plan), (statement, plan)
