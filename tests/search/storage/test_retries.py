"""Failed trials that are tried again: new work for the same trials, and nothing that was decided changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autoeff.errors import Conflict, FailureClass, LeaseLost
from autoeff.search.storage import Claim, JobState, Proposal, State, Store
from autoeff.spaces.measurements import Measurement

Make = Callable[..., Proposal]
KL = Measurement("kl", 0.25, "search", 2048)


def submitted(store: Store, me: str, job_id: str = "job") -> tuple[str, int]:
    store.create_job(job_id, {"budget": {"trials": 9}}, {}, {}, "0" * 64, queue="cpu")
    fence = store.acquire_coordinator(job_id, me, 600)
    store.set_job_state(job_id, fence, JobState.RUNNING)
    return job_id, fence


def proposed(store: Store, job: tuple[str, int], proposal: Proposal, me: str) -> Claim:
    claim = store.propose(*job, proposal, claim_for=me, ttl_s=60).claim
    assert claim is not None
    return claim


@pytest.fixture
def job(store: Store, proposal: Make, me: str) -> tuple[str, int]:
    """A running job: trial 0 succeeded, 1 and its repetition 2 ran out of memory, 3 lost three workers, 4 crashed."""
    job = submitted(store, me)
    assert store.complete(proposed(store, job, proposal(0), me), [KL], 0.1)
    assert store.fail(proposed(store, job, proposal(1), me), FailureClass.OOM_HOST, "full", "the log of 1")
    store.propose(*job, proposal(2, 1), told=[0, 1])
    store.lost(proposed(store, job, proposal(3), me), "gone")
    while (claim := store.claim(store.trial("job", 3).evaluation_id, me, 60)) is not None:
        store.lost(claim, "gone")
    assert store.fail(proposed(store, job, proposal(4), me), FailureClass.CRASH, "SIGSEGV")
    return job


def states(store: Store) -> list[State]:
    return [trial.state for trial in store.trials("job")]


def test_failed_trials_ask_for_new_work(store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
    before = store.trials("job")
    assert states(store) == [State.SUCCEEDED, State.FAILED, State.FAILED, State.QUARANTINED, State.FAILED]
    retried = store.retry_failed("job")
    assert (retried.state, retried.coordinator, retried.counts.open) == (JobState.RUNNING, None, 4)
    assert (retried.counts.failed, retried.counts.quarantined, retried.counts.cost) == (0, 0, 4.0)  # nothing is paid twice
    assert states(store) == [State.SUCCEEDED, *[State.QUEUED] * 4]
    trials = store.trials("job")
    assert trials[0] == before[0]
    assert trials[1].evaluation_id == trials[2].evaluation_id != before[1].evaluation_id
    assert [trial.earlier for trial in trials] == [(), *[(trial.evaluation_id,) for trial in before[1:]]]
    assert not any(trial.told for trial in trials[1:])
    assert sorted(store.waiting(["cpu"], 9)) == sorted({trial.evaluation_id for trial in trials[1:]})
    with pytest.raises(LeaseLost):
        store.propose(*job, proposal(5))
    for trial in {trial.evaluation_id: trial for trial in trials[1:]}.values():
        claim = store.claim(trial.evaluation_id, me, 60)
        assert claim is not None
        assert store.complete(claim, [KL], 0.1)
    assert states(store) == [State.SUCCEEDED] * 5
    attempts = store.attempts(*store.trial("job", 3).evaluations)
    assert [attempt.outcome for attempt in attempts] == ["lost"] * 3 + ["succeeded"]
    assert store.attempts(before[1].evaluation_id)[0].log == "the log of 1"
    events = store.events("job", limit=1000)
    assert [event.seq for event in events] == list(range(1, store.job("job").events + 1))
    assert [event.body["trial"] for event in events if event.kind == "trial.retried"] == [1, 2, 3, 4]


def test_only_failures_of_some_classes(store: Store, job: tuple[str, int]) -> None:
    store.retry_failed("job", [FailureClass.CRASH, FailureClass.LOST])
    assert states(store) == [State.SUCCEEDED, State.FAILED, State.FAILED, State.QUEUED, State.QUEUED]
    same = store.retry_failed("job", [FailureClass.NAN])
    assert same == store.job("job")
    assert states(store)[1] is State.FAILED


def test_what_fails_again_may_be_tried_again(store: Store, job: tuple[str, int], me: str) -> None:
    for n in range(2):
        store.retry_failed("job", [FailureClass.CRASH])
        trial = store.trial("job", 4)
        claim = store.claim(trial.evaluation_id, me, 60)
        assert claim is not None
        assert store.fail(claim, FailureClass.CRASH, f"again {n}")
    assert len(store.trial("job", 4).evaluations) == 3
    messages = [attempt.failure.message for attempt in store.attempts(*store.trial("job", 4).evaluations) if attempt.failure]
    assert messages == ["SIGSEGV", "again 0", "again 1"]
    assert store.counts("job").failed == 3


def test_equal_work_that_another_job_did_since_is_shared(store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
    other = submitted(store, me, "other")
    assert store.complete(proposed(store, other, proposal(0, 4), me), [KL], 0.1)
    running = proposed(store, other, proposal(1, 1), me)
    store.retry_failed("job")
    assert states(store) == [State.SUCCEEDED, State.RUNNING, State.RUNNING, State.QUEUED, State.SUCCEEDED]
    assert store.trial("job", 4).evaluation_id == store.trial("other", 0).evaluation_id
    assert [trial.number for trial in store.untold("job")] == [4]
    assert store.counts("job").succeeded == 2
    assert store.complete(running, [KL], 0.1)
    assert store.counts("job").succeeded == 4


@pytest.mark.parametrize("state", [JobState.PAUSED, JobState.FAILED])
def test_a_job_that_rests_goes_on(store: Store, job: tuple[str, int], state: JobState) -> None:
    store.set_job_state(*job, state, error="the disk was full")
    retried = store.retry_failed("job")
    assert (retried.state, retried.error, retried.ended_at) == (JobState.PENDING, None, None)


def test_a_job_that_has_ended_stays_as_it_is(store: Store, job: tuple[str, int]) -> None:
    store.set_job_state(*job, JobState.SUCCEEDED, {"found": 0})
    before = store.trials("job")
    with pytest.raises(Conflict, match="is succeeded; submit it again"):
        store.retry_failed("job")
    assert store.trials("job") == before
    assert store.waiting(["cpu"]) == []


def test_what_a_candidate_printed_moves_no_cursor(store: Store, proposal: Make, me: str) -> None:
    job = submitted(store, me)
    claim = proposed(store, job, proposal(0), me)
    assert store.fail(claim, FailureClass.CRASH, "\x1b]0;title\x07", "10 %\r20 %\r\n\x1b[2Jdone\tall \u202eright\x9b0m")
    (attempt,) = store.attempts(claim.evaluation_id)
    assert attempt.failure is not None
    assert attempt.failure.message == "\u241b]0;title\u2407"
    assert attempt.log == "10 %\n20 %\n\u241b[2Jdone\tall \ufffdright\ufffd0m"
