"""The life of an evaluation: claims, fences, losses, and that nothing decided ever changes."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy import Engine, event
from sqlalchemy.exc import IntegrityError

from autoeff.errors import FailureClass
from autoeff.search.storage import Claim, Failure, Proposal, State, Store, Trial, process_identity
from autoeff.search.storage.work import LOG_CHARACTERS
from autoeff.spaces.configuration import Configuration, digest_of
from autoeff.spaces.measurements import Measurement

KL = Measurement("kl", 0.25, "search", 2048)


@pytest.fixture
def evaluation(store: Store, job: tuple[str, int], proposal: Callable[..., Proposal]) -> int:
    return store.propose(*job, proposal(0)).evaluation_id


def claimed(store: Store, evaluation: int, worker: str, ttl_s: float = 60.0) -> Claim:
    claim = store.claim(evaluation, worker, ttl_s)
    assert claim is not None
    return claim


def state(store: Store) -> State:
    return store.trial("job", 0).state


def test_only_queued_work_can_be_claimed(store: Store, evaluation: int, me: str) -> None:
    claim = claimed(store, evaluation, me)
    assert (claim.evaluation_id, claim.worker, claim.attempt) == (evaluation, me, 1)
    assert store.claim(evaluation, me, 60) is None
    assert store.claim(evaluation + 1, me, 60) is None
    assert state(store) is State.RUNNING


def test_result_is_accepted_once(store: Store, evaluation: int, me: str) -> None:
    claim = claimed(store, evaluation, me)
    assert store.complete(claim, [KL], 0.5, {"rss": 1})
    events = store.events("job")
    assert not store.complete(claim, [Measurement("kl", 9.0, "search", 2048)], 0.5)
    assert not store.fail(claim, FailureClass.CRASH, "late")
    assert not store.renew(claim, 60)
    assert not store.release(claim)
    assert store.lost(claim, "late") is State.SUCCEEDED
    assert store.events("job") == events
    assert (state(store), store.trial("job", 0).value("kl")) == (State.SUCCEEDED, 0.25)
    assert store.counts("job").succeeded == 1


def test_late_result_is_kept_and_does_not_count(store: Store, evaluation: int, me: str) -> None:
    stale = claimed(store, evaluation, me, ttl_s=0)
    assert store.reap() == 1
    fresh = claimed(store, evaluation, me)
    assert (fresh.attempt, fresh.fence > stale.fence) == (2, True)
    assert not store.complete(stale, [Measurement("kl", 9.0, "search", 2048)], 7.0, {"rss": 1})
    assert state(store) is State.RUNNING
    assert store.complete(fresh, [KL], 0.5)
    first, second = store.attempts(evaluation)
    assert (first.accepted, first.outcome, second.accepted, second.outcome) == (False, "lost", True, "succeeded")
    assert first.late is not None
    assert first.late["measurements"][0] | {"name": "kl", "value": 9.0} == first.late["measurements"][0]
    assert first.late["seconds"] == 7.0
    assert second.late is None
    assert store.trial("job", 0).value("kl") == 0.25


def test_late_result_of_a_quarantined_candidate_does_not_change_the_verdict(store: Store, evaluation: int, me: str) -> None:
    for _ in range(3):
        claim = claimed(store, evaluation, me, ttl_s=0)
        store.reap()
    before = store.trial("job", 0)
    assert not store.complete(claim, [KL], 0.5)
    assert store.trial("job", 0) == before
    assert store.attempts(evaluation)[-1].late is not None


def test_expired_claim_counts_until_somebody_ends_it(store: Store, evaluation: int, me: str) -> None:
    assert store.complete(claimed(store, evaluation, me, ttl_s=0), [KL], 0.5)
    assert store.reap() == 0


def test_renewed_claim_is_not_reaped(store: Store, evaluation: int, me: str) -> None:
    claim = claimed(store, evaluation, me, ttl_s=0)
    assert store.renew(claim, 60)
    assert store.reap() == 0
    assert state(store) is State.RUNNING


def test_third_loss_quarantines(store: Store, evaluation: int, me: str) -> None:
    for expected in (State.QUEUED, State.QUEUED, State.QUARANTINED):
        assert state(store) is State.QUEUED
        assert store.lost(claimed(store, evaluation, me), "the device fell off the bus", "log") is expected
    trial = store.trial("job", 0)
    assert (trial.state, trial.attempts) == (State.QUARANTINED, 3)
    assert trial.failure == Failure(FailureClass.LOST, "the device fell off the bus; lost 3 workers, so it is not tried again")
    assert store.claim(evaluation, me, 60) is None
    assert [attempt.accepted for attempt in store.attempts(evaluation)] == [False, False, True]
    assert store.counts("job").quarantined == 1
    assert [trial.number for trial in store.untold("job")] == [0]


def test_stop_on_request_is_no_loss(store: Store, evaluation: int, me: str) -> None:
    for reason in "abcd":
        assert store.release(claimed(store, evaluation, me), reason)
    assert store.complete(claimed(store, evaluation, me), [KL], 0.5)
    assert store.trial("job", 0).attempts == 5
    assert [attempt.outcome for attempt in store.attempts(evaluation)] == ["released"] * 4 + ["succeeded"]
    assert [event.body["reason"] for event in store.events("job") if event.kind == "trial.queued"] == list("abcd")


def test_candidates_own_failure_is_final(store: Store, evaluation: int, me: str) -> None:
    assert store.fail(
        claimed(store, evaluation, me), FailureClass.TIMEOUT, "no result in 5 s", "x" * LOG_CHARACTERS + "the end", {"rss": 1}
    )
    assert state(store) is State.FAILED
    assert store.claim(evaluation, me, 60) is None
    (attempt,) = store.attempts(evaluation)
    assert attempt.failure == Failure(FailureClass.TIMEOUT, "no result in 5 s")
    assert attempt.log is not None
    assert (len(attempt.log), attempt.log[-7:], attempt.facts) == (LOG_CHARACTERS, "the end", {"rss": 1})
    assert store.counts("job").failed == 1


def test_lost_worker_is_not_recorded_as_the_candidates_failure(store: Store, evaluation: int, me: str) -> None:
    with pytest.raises(ValueError, match="call lost"):
        store.fail(claimed(store, evaluation, me), FailureClass.LOST, "gone")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_no_result(store: Store, evaluation: int, me: str, value: float) -> None:
    claim = claimed(store, evaluation, me)
    with pytest.raises(ValueError, match="kl is"):
        store.complete(claim, [Measurement("kl", value, "search", 1)], 0.5)
    assert store.complete(claim, [KL], 0.5)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE evaluation SET state = 'queued', accepted_fence = NULL",
        "UPDATE evaluation SET ended_at = 0",
        "DELETE FROM evaluation",
        "UPDATE measurement SET value = 0",
        "DELETE FROM measurement",
        "UPDATE attempt SET outcome = 'failed'",
        "DELETE FROM attempt",
    ],
)
def test_what_is_decided_cannot_be_changed_by_any_statement(store: Store, evaluation: int, me: str, statement: str) -> None:
    store.complete(claimed(store, evaluation, me), [KL], 0.5)
    before = store.trial("job", 0), store.attempts(evaluation)
    with pytest.raises(IntegrityError, match=r"is final|FOREIGN KEY"), store._database.write() as connection:
        connection.exec_driver_sql(statement)
    assert (store.trial("job", 0), store.attempts(evaluation)) == before


def test_threads_race_for_a_claim_and_one_wins(store: Store, job: tuple[str, int], proposal: Callable[..., Proposal], me: str) -> None:
    ids = [store.propose(*job, proposal(number)).evaluation_id for number in range(8)]
    won: list[Claim] = []
    start = threading.Barrier(4)

    def race() -> None:
        start.wait()
        for evaluation_id in ids:
            if claim := store.claim(evaluation_id, me, 60):
                won.append(claim)
                store.complete(claim, [KL], 0.1)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.evaluation_id for claim in won) == ids
    assert store.counts("job").succeeded == len(ids)
    assert [event.seq for event in store.events("job")] == list(range(1, 2 + 3 * len(ids) + 1))


def test_processes_race_for_claims_and_every_one_is_won_once(
    store: Store, url: str, job: tuple[str, int], proposal: Callable[..., Proposal], race: Callable[[str, int], list[str]]
) -> None:
    ids = [store.propose(*job, proposal(number)).evaluation_id for number in range(25)]
    code = f"""
from autoeff.search.storage import Store, process_identity
def run(i):
    store, me = Store.open({url!r}), process_identity()
    for evaluation_id in {ids}:
        claim = store.claim(evaluation_id, me, 60)
        if claim and store.complete(claim, [], 0.1):
            print(f"{{evaluation_id}}\\n", end="", flush=True)  # in one piece, whoever else prints
"""
    assert sorted(int(line) for line in race(code, 4)) == ids
    assert store.counts("job").succeeded == len(ids)


class Life(RuleBasedStateMachine):
    """Any holders do anything in any order; a plain model says what must come of it."""

    claims: Bundle[Claim] = Bundle("claims")
    store: Store
    jobs = 0

    @initialize()
    def begin(self) -> None:
        type(self).jobs += 1
        self.job = f"job{self.jobs}"
        self.store.create_job(self.job, {}, {}, {}, "")
        fence = self.store.acquire_coordinator(self.job, ME, 3600)
        made = Proposal(0, Configuration({}), "given", "search", 1, 1.0, digest_of(self.job), {}, True)
        self.evaluation = self.store.propose(self.job, fence, made).evaluation_id
        self.state, self.losses, self.fence = State.QUEUED, 0, 0
        self.fences: list[int] = []
        self.live: Claim | None = None
        self.expired = False
        self.verdict: tuple[Trial, Any] | None = None

    @rule(target=claims, ttl_s=st.sampled_from([0.0, 60.0]))
    def claim(self, ttl_s: float) -> Any:
        claim = self.store.claim(self.evaluation, ME, ttl_s)
        assert (claim is not None) == (self.state is State.QUEUED)
        if claim is None:
            return multiple()
        self.fence += 1
        assert claim.fence == self.fence
        self.fences.append(claim.fence)
        assert claim.attempt == len(self.fences)
        self.state, self.live, self.expired = State.RUNNING, claim, ttl_s == 0.0
        return claim

    @rule(claim=claims, ttl_s=st.sampled_from([0.0, 60.0]))
    def renew(self, claim: Claim, ttl_s: float) -> None:
        assert self.store.renew(claim, ttl_s) == (claim == self.live)
        if claim == self.live:
            self.expired = ttl_s == 0.0

    @rule(claim=claims)
    def complete(self, claim: Claim) -> None:
        assert self.store.complete(claim, [KL], 0.1) == (claim == self.live)
        self.ended(claim, State.SUCCEEDED)

    @rule(claim=claims)
    def fail(self, claim: Claim) -> None:
        assert self.store.fail(claim, FailureClass.NAN, "nan") == (claim == self.live)
        self.ended(claim, State.FAILED)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        assert self.store.release(claim) == (claim == self.live)
        self.ended(claim, State.QUEUED)

    @rule(claim=claims)
    def lose(self, claim: Claim) -> None:
        told = self.store.lost(claim, "gone")
        if claim == self.live:
            self.gone()
        assert told is self.state

    @rule()
    def reap(self) -> None:
        assert self.store.reap() == int(self.live is not None and self.expired)
        if self.live is not None and self.expired:
            self.gone()

    def gone(self) -> None:
        self.losses += 1
        self.ended(self.live, State.QUARANTINED if self.losses == 3 else State.QUEUED)

    def ended(self, claim: Claim | None, state: State) -> None:
        if claim == self.live:
            self.state, self.live = state, None
            self.fence += int(state is State.QUEUED)

    @invariant()
    def store_agrees_with_the_model(self) -> None:
        trial = self.store.trial(self.job, 0)
        attempts = self.store.attempts(self.evaluation)
        assert trial.state is self.state
        assert [attempt.fence for attempt in attempts] == self.fences
        assert sum(attempt.accepted for attempt in attempts) == int(self.state.terminal)
        assert (trial.value("kl") == 0.25) == (self.state is State.SUCCEEDED)
        assert self.store.counts(self.job).open == int(not self.state.terminal)
        if self.state.terminal:
            verdict = trial, [attempt.outcome for attempt in attempts]
            assert self.verdict in (None, verdict)
            self.verdict = verdict

    def teardown(self) -> None:
        # The next example's reaper must find nothing of this one.
        if self.live is not None:
            self.store.release(self.live)
        events = self.store.events(self.job)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))


ME = process_identity()


class TestLifeOnServer(Life.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=6, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])

    @pytest.fixture(autouse=True)
    def _one_store(self, servers: ModuleType, postgres: Any, empty_on_server: str) -> Any:
        with Store.open(servers.new_database(postgres, empty_on_server)) as store:
            Life.store = store
            yield


class TestLife(Life.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])

    @pytest.fixture(autouse=True)
    def _one_store(self) -> Any:
        memory = Path("/dev/shm")  # no disk to wait for
        with (
            tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
            Store.open(f"sqlite:///{folder}/life.db") as store,
        ):
            Life.store = store
            yield


def test_no_clock_but_the_database_s_is_written(
    store: Store, job: tuple[str, int], proposal: Callable[..., Proposal], me: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose clock is hours off neither loses its claims nor keeps them: no time of a process is sent."""
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + 7200)
    sent: list[float] = []

    def look(connection: object, cursor: object, statement: str, parameters: Any, *_: object) -> None:
        rows = parameters if isinstance(parameters, list) else [parameters]
        values = [value for row in rows for value in (row.values() if isinstance(row, dict) else row)]
        sent.extend(value for value in values if isinstance(value, int | float))

    event.listen(Engine, "before_cursor_execute", look)
    try:
        store.announce_worker(me, ["cpu"], "cpu", {}, 60)
        claim = store.propose(*job, proposal(0), claim_for=me, ttl_s=60).claim
        assert claim is not None
        assert store.renew(claim, 60)
        assert store.reap() == 0
        assert store.complete(claim, [KL], 0.5)
        store.renew_coordinator(*job, 60)
    finally:
        event.remove(Engine, "before_cursor_execute", look)
    assert len(sent) > 5
    assert max(sent) < 1e6, "a point in time is above 10^9"
    ended = store.attempts(claim.evaluation_id)[0].ended_at
    assert ended is not None
    assert abs(ended.timestamp() - real) < 60
