"""What users order, who is told, and who works: jobs of a service in the store."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from autoeff.errors import Conflict, LeaseLost, NotFound, Stale
from autoeff.search.storage import JobState, Orders, Proposal, Reply, State, Store
from autoeff.search.storage.tables import ApiKeyRow, IdempotencyRow, OutboxRow, now
from autoeff.spaces.measurements import Measurement

Make = Callable[..., Proposal]
KL = Measurement("kl", 0.25, "search", 2048)


def submitted(store: Store, me: str, job_id: str = "job", owner: str = "ada") -> tuple[str, int]:
    store.create_job(job_id, {"budget": {"trials": 9, "seconds": None}}, {}, {}, "0" * 64, owner=owner, queue="cpu")
    fence = store.acquire_coordinator(job_id, me, 600)
    store.set_job_state(job_id, fence, JobState.RUNNING)
    return job_id, fence


@pytest.fixture
def job(store: Store, me: str) -> tuple[str, int]:
    return submitted(store, me)


class TestOrders:
    def test_paused_job_gets_no_trials_and_its_running_ones_end(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        ref = store.propose(*job, proposal(0), claim_for=me, ttl_s=60)
        assert store.pause("job").state is JobState.PAUSED
        assert store.pause("job").version == store.job("job").version  # said twice, done once
        with pytest.raises(Conflict, match="is paused; nothing is proposed"):
            store.propose(*job, proposal(1))
        assert ref.claim is not None
        assert store.renew(ref.claim, 60)
        assert store.complete(ref.claim, [KL], 0.1)
        assert store.resume("job").state is JobState.PENDING
        store.set_job_state(*job, JobState.RUNNING)
        assert store.resume("job").state is JobState.RUNNING
        store.propose(*job, proposal(1))

    def test_failed_job_finds_work_again_that_was_set_aside_with_another(
        self, store: Store, job: tuple[str, int], proposal: Make, me: str
    ) -> None:
        other = submitted(store, me, "other")
        shared = store.propose(*job, proposal(0, "same")).evaluation_id
        store.propose(*other, proposal(0, "same"))
        store.set_job_state(*other, JobState.FAILED, error="its model is gone")
        store.pause("job", at_once=True)
        assert store.waiting(["cpu"]) == []
        store.resume("other")
        assert store.waiting(["cpu"]) == [shared]

    def test_job_paused_and_resumed_before_its_coordinator_looks_can_end(self, store: Store, job: tuple[str, int]) -> None:
        store.pause("job")
        store.resume("job")
        store.set_job_state(*job, JobState.SUCCEEDED, {})
        assert store.job("job").state is JobState.SUCCEEDED

    def test_job_paused_at_once_gives_back_what_runs_until_it_goes_on(
        self, store: Store, job: tuple[str, int], proposal: Make, me: str
    ) -> None:
        running = store.propose(*job, proposal(0), claim_for=me, ttl_s=60)
        queued, shared = (store.propose(*job, proposal(n, key)).evaluation_id for n, key in ((1, None), (2, "same")))
        other = submitted(store, me, "other")
        store.propose(*other, proposal(0, "same"))
        for _ in range(2):  # said twice, done once
            paused = store.pause("job", at_once=True)
            assert (paused.state, paused.counts.open) == (JobState.PAUSED, 3)
            assert store.waiting(["cpu"], 9) == [shared], "what a job that goes on wants is not set aside"
        assert [trial.state for trial in store.trials("job")] == [State.QUEUED] * 3
        assert running.claim is not None
        assert not store.renew(running.claim, 60)
        assert not store.complete(running.claim, [KL], 0.1)
        assert store.claim(running.evaluation_id, me, 60) is None, "as by a message that was sent before"
        assert store.propose(*other, proposal(1, 1)).evaluation_id == queued
        assert store.waiting(["cpu"], 9) == [queued, shared], "another job wants it"
        store.resume("job")
        assert store.waiting(["cpu"], 9) == [running.evaluation_id, queued, shared]
        claim = store.claim(running.evaluation_id, me, 60)
        assert claim is not None
        assert store.complete(claim, [KL], 0.1)
        assert [attempt.outcome for attempt in store.attempts(running.evaluation_id)] == ["released", "succeeded"]

    def test_cancelled_job_ends_when_its_workers_have_heard(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        running = store.propose(*job, proposal(0), claim_for=me, ttl_s=60).claim
        assert running is not None
        store.propose(*job, proposal(1))
        assert store.cancel("job").state is JobState.CANCELLING
        assert [trial.state for trial in store.trials("job")] == [State.RUNNING, State.CANCELLED]
        assert store.waiting(["cpu"]) == []
        assert not store.renew(running, 60)  # how the worker hears of it
        assert store.release(running)
        assert [trial.state for trial in store.trials("job")] == [State.CANCELLED, State.CANCELLED]
        ended = store.job("job")
        assert (ended.state, ended.counts.cancelled, ended.counts.open) == (JobState.CANCELLED, 2, 0)
        assert [event.kind for event in store.events("job")][-1] == "job.cancelled"
        assert store.cancel("job").state is JobState.CANCELLED
        with pytest.raises(Conflict, match="is cancelled and cannot become pending"):
            store.resume("job")

    def test_job_without_work_under_way_is_cancelled_at_once(self, store: Store, job: tuple[str, int], proposal: Make) -> None:
        store.propose(*job, proposal(0))
        assert store.cancel("job").state is JobState.CANCELLED

    def test_dead_worker_does_not_keep_a_job_from_being_cancelled(
        self, store: Store, job: tuple[str, int], proposal: Make, me: str
    ) -> None:
        store.propose(*job, proposal(0), claim_for=me, ttl_s=0)
        assert store.cancel("job").state is JobState.CANCELLING
        assert store.reap() == 1
        assert (store.job("job").state, store.trial("job", 0).state) == (JobState.CANCELLED, State.CANCELLED)

    def test_cancelling_spares_what_another_job_wants(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        other = submitted(store, me, "other")
        ref = store.propose(*job, proposal(0, "same"))
        assert store.propose(*other, proposal(0, "same")).evaluation_id == ref.evaluation_id
        assert store.cancel("job").state is JobState.CANCELLING
        claim = store.claim(ref.evaluation_id, me, 60)
        assert claim is not None
        assert store.renew(claim, 60)
        assert store.complete(claim, [KL], 0.1)
        assert store.job("job").state is JobState.CANCELLED
        assert (store.job("other").state, store.trial("other", 0).value("kl")) == (JobState.RUNNING, 0.25)

    def test_interrupted_cancelling_is_finished_by_the_reaper(self, store: Store, job: tuple[str, int], proposal: Make) -> None:
        store.propose(*job, proposal(0))
        store._order("job", None, JobState.CANCELLING, ())  # and the process died before it could sweep
        assert store.job("job").state is JobState.CANCELLING
        store.reap()
        assert store.job("job").state is JobState.CANCELLED

    def test_cancelled_work_is_done_for_the_next_job_that_wants_it(
        self, store: Store, job: tuple[str, int], proposal: Make, me: str
    ) -> None:
        dropped = store.propose(*job, proposal(0, "same"))
        store.cancel("job")
        fresh = store.propose(*submitted(store, me, "other"), proposal(0, "same"))
        assert fresh.evaluation_id != dropped.evaluation_id
        assert store.waiting(["cpu"]) == [fresh.evaluation_id]

    def test_budget_changes_for_who_has_seen_the_job_as_it_is(self, store: Store, job: tuple[str, int]) -> None:
        seen = store.job("job").version
        changed = store.change_budget("job", {"trials": 12}, seen)
        assert (changed.version, changed.budget) == (seen + 1, {"trials": 12, "seconds": None})
        with pytest.raises(Stale, match=f"of version {seen + 1}, not {seen}"):
            store.change_budget("job", {"trials": 99}, seen)
        assert store.change_budget("job", {"seconds": 60.0}, seen + 1).budget == {"trials": 12, "seconds": 60.0}
        assert store.orders(*job) == Orders(JobState.RUNNING, {"trials": 12, "seconds": 60.0})
        store.cancel("job")
        with pytest.raises(Conflict, match="its budget cannot change any more"):
            store.change_budget("job", {"trials": 1}, store.job("job").version)

    def test_orders_reach_only_who_drives_the_job(self, store: Store, job: tuple[str, int]) -> None:
        store.release_coordinator(*job)
        with pytest.raises(LeaseLost):
            store.orders(*job)

    @pytest.mark.parametrize("end", [JobState.SUCCEEDED, JobState.CANCELLED])
    def test_end_of_a_job_cannot_be_changed_by_any_statement(self, store: Store, job: tuple[str, int], end: JobState) -> None:
        store.set_job_state(*job, end)
        with pytest.raises(IntegrityError, match="job is final"), store.database.write() as connection:
            connection.exec_driver_sql("UPDATE job SET state = 'running'")
        assert store.job("job").state is end

    def test_failed_job_says_why_and_can_go_on(self, store: Store, job: tuple[str, int]) -> None:
        store.set_job_state(*job, JobState.FAILED, error="the model is gone")
        assert (store.job("job").error, store.events("job")[-1].body) == ("the model is gone", {"message": "the model is gone"})
        assert store.resume("job").state is JobState.PENDING
        assert store.job("job").error is None


class TestSubmitting:
    def test_other_owners_see_nothing(self, store: Store, me: str) -> None:
        for owner, job_id in (("ada", "a"), ("bob", "b")):
            submitted(store, me, job_id, owner)
        assert [job.id for job in store.jobs(owner="ada")] == ["a"]
        assert store.job("a", "ada").owner == "ada"
        with pytest.raises(NotFound):
            store.job("a", "bob")

    def test_lists_are_filtered(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        submitted(store, me, "other")
        store.pause("other")
        assert [one.id for one in store.jobs(states=[JobState.PAUSED])] == ["other"]
        store.propose(*job, proposal(0, origin="dense"), claim_for=me, ttl_s=60)
        store.propose(*job, proposal(1))
        assert [trial.number for trial in store.trials("job", states=[State.QUEUED])] == [1]
        assert [trial.number for trial in store.trials("job", origin="dense")] == [0]
        assert store.heads(["job", "nope"]) == {"job": (store.job("job").state, store.events("job")[-1].seq)}

    def test_submitted_jobs_wait_until_somebody_drives_them(self, store: Store, me: str) -> None:
        for job_id in ("a", "b", "c"):
            store.create_job(job_id, {}, {}, {}, "", queue="cpu")
        store.create_job("embedded", {}, {}, {}, "")
        store.acquire_coordinator("a", me, 600)
        store.acquire_coordinator("b", me, 0)
        store.pause("c")
        assert store.waiting_jobs("other") == {"b": "cpu"}
        assert list(store.waiting_jobs(me)) == ["a", "b"]  # whose driver may have been thrown out by an outage

    def test_a_process_may_begin_anew_with_a_job_that_it_drives(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        fence = store.acquire_coordinator("job", me, 600)
        with pytest.raises(LeaseLost):
            store.propose(*job, proposal(0))
        store.propose("job", fence, proposal(0))

    def test_answer_is_stored_with_the_job_or_neither(self, store: Store) -> None:
        with store.database.write() as connection:
            key = {"prefix": "abcd", "name": "", "sha256": "", "scopes": [], "owner": "ada", "created_at": now()}
            connection.execute(ApiKeyRow.__table__.insert().values(key))
        reply = Reply("abcd", "once", "f" * 64, 202, {"id": "a"}, ttl_s=60)
        store.create_job("a", {}, {}, {}, "", reply=reply)
        with pytest.raises(Conflict, match="has an answer already"):
            store.create_job("b", {}, {}, {}, "", reply=reply)
        assert [job.id for job in store.jobs()] == ["a"]
        with store.database.write() as connection:
            connection.execute(IdempotencyRow.__table__.update().values(expires_at=now() - 1.0))
        store.create_job("b", {}, {}, {}, "", reply=reply)  # after its time it is a new request


class TestMessages:
    def test_message_is_due_until_its_evaluation_is_claimed(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        ref = store.propose(*job, proposal(0))
        assert [(m.evaluation_id, m.queue, m.sent) for m in store.due(again_s=0.0)] == [(ref.evaluation_id, "cpu", 0)]
        assert [m.sent for m in store.due(again_s=600.0)] == [1]
        assert store.due(again_s=600.0) == []
        claim = store.claim(ref.evaluation_id, me, 60)
        assert claim is not None
        assert store.waiting(["cpu"]) == []
        store.lost(claim, "gone")
        assert [m.sent for m in store.due(again_s=0.0)] == [0]
        assert store.claim(ref.evaluation_id, me, 60) is not None
        with store.database.read() as connection:
            assert connection.execute(select(OutboxRow.evaluation_id)).all() == []

    def test_message_that_nobody_takes_is_sent_less_often(self, store: Store, job: tuple[str, int], proposal: Make) -> None:
        store.propose(*job, proposal(0))
        assert [len(store.due(again_s=0.0)) for _ in range(10)] == [1] * 7 + [0] * 3

    def test_workers_leave_jobs_out_that_they_cannot_begin(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        ref = store.propose(*job, proposal(0))
        other = store.propose(*submitted(store, me, "other"), proposal(0, "another"))
        assert store.waiting(["cpu"], 9, but=["job"]) == [other.evaluation_id]
        assert store.waiting(["cpu"], 9, but=["other"]) == [ref.evaluation_id]

    def test_workers_hear_of_their_queues_alone(self, store: Store, job: tuple[str, int], proposal: Make) -> None:
        ids = [store.propose(*job, proposal(number)).evaluation_id for number in range(3)]
        assert store.waiting(["gpu.any"]) == []
        assert store.waiting(["gpu.any", "cpu"], limit=2) == ids[:2]
        assert store.waiting(["cpu"], 9, job_id="another") == []

    def test_search_without_a_server_sends_nothing(self, store: Store, me: str, proposal: Make) -> None:
        store.create_job("embedded", {}, {}, {}, "")
        store.propose("embedded", store.acquire_coordinator("embedded", me, 60), proposal(0))
        assert store.due(again_s=0.0) == []

    def test_job_of_an_evaluation_is_the_first_that_asked(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        ref = store.propose(*job, proposal(0, "same"))
        store.propose(*submitted(store, me, "other"), proposal(0, "same"))
        assert store.job_of_evaluation(ref.evaluation_id).id == "job"


class TestWorkers:
    def test_workers_are_listed_while_they_are_seen(self, store: Store, job: tuple[str, int], proposal: Make, me: str) -> None:
        store.announce_worker(me, ["cpu"], "cpu", {"cores": 2}, ttl_s=60)
        store.announce_worker("far/machine/1/1.0", ["gpu.any"], "h200", {"cores": 16}, ttl_s=0)
        store.propose(*job, proposal(0), claim_for=me, ttl_s=60)
        mine, far = sorted(store.workers(), key=lambda worker: worker.kind)
        assert (mine.id, mine.alive, mine.evaluation_id, mine.facts, mine.queues) == (me, True, 1, {"cores": 2}, ["cpu"])
        assert (far.kind, far.alive, far.evaluation_id) == ("h200", False, None)
        store.worker_seen(far.id, 60)
        assert all(worker.alive for worker in store.workers())
        store.worker_seen(me, 0)
        assert {worker.kind: worker.alive for worker in store.workers()} == {"cpu": False, "h200": True}


def test_many_coordinators_and_workers_lose_nothing(store: Store, me: str, proposal: Make) -> None:
    jobs = [submitted(store, me, f"job{i}") for i in range(3)]
    failed: list[BaseException] = []
    proposed = threading.Event()

    def propose(job: tuple[str, int]) -> None:
        for number in range(12):
            store.propose(*job, proposal(number, number % 8))  # work that the jobs share, and repeat

    def work() -> None:
        over = False
        while not over:
            over = proposed.is_set()
            for evaluation_id in store.waiting(["cpu"], 64):
                if claim := store.claim(evaluation_id, me, 60):
                    assert store.complete(claim, [KL], 0.1)

    def run(target: Callable[..., None], *args: object) -> None:
        try:
            target(*args)
        except BaseException as error:
            failed.append(error)

    proposers = [threading.Thread(target=run, args=(propose, job)) for job in jobs]
    workers = [threading.Thread(target=run, args=(work,)) for _ in range(3)]
    for thread in (*proposers, *workers):
        thread.start()
    for thread in proposers:
        thread.join()
    proposed.set()
    for thread in workers:
        thread.join()
    assert failed == []
    for job_id, _ in jobs:
        counts = store.job(job_id).counts
        assert (counts.trials, counts.succeeded, counts.open) == (12, 12, 0)
        events = store.events(job_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert sum(event.kind == "trial.succeeded" for event in events) == 12
