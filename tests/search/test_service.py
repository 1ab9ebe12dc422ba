"""Submitted searches, driven by one thread of this process and evaluated by another, or by a Celery worker."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from celery import Celery
from redis import Redis
from sqlalchemy import update

from autoeff.errors import InputError
from autoeff.search.celery_app import app, sender
from autoeff.search.crew import Stopped
from autoeff.search.job import JobSpec
from autoeff.search.model import plan
from autoeff.search.planned import PlannedJob
from autoeff.search.resolve import resolve
from autoeff.search.samplers.problem import Candidate
from autoeff.search.service import drive, run_coordinators
from autoeff.search.settings import Settings
from autoeff.search.station import Station, check_queues
from autoeff.search.storage import Job, JobState, Message, State, Store, Trial
from autoeff.search.storage.tables import JobRow
from autoeff.search.submission import queue_of, submit

LOOSE, TIGHT = "linear_bytes<=0.35x", "linear_bytes<=0.30x"
Make = Callable[..., JobSpec]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "service", memory_cap_bytes=3 << 30, lease_s=6, poll_s=0.05)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with Store.open(settings.database) as opened:
        yield opened


@contextmanager
def coordinating(settings: Settings) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=run_coordinators, args=(settings, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def working(settings: Settings) -> Iterator[Station]:
    station = Station(settings, ["cpu"])
    station.open()
    thread = threading.Thread(target=station.run)
    thread.start()
    try:
        yield station
    finally:
        station.stop(grace_s=0.0)
        thread.join()
        station.close()


@pytest.fixture(scope="module")
def service(redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of a service with a broker."""
    home = tmp_path_factory.mktemp("service")
    return Settings(home=home, memory_cap_bytes=3 << 30, lease_s=6, poll_s=0.05, broker_url=redis.url, resend_s=1.0)


@pytest.fixture(scope="module")
def celery_worker(service: Settings) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts its one Celery worker, when it is first called."""
    variables = {
        "AUTOEFF_HOME": str(service.home),
        "AUTOEFF_LEASE_S": str(service.lease_s),
        "AUTOEFF_MEMORY_CAP_BYTES": str(service.memory_cap),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "autoeff.cli", "worker", "--queues", "cpu", "--broker", str(service.broker_url)]
    running: list[subprocess.Popen[bytes]] = []

    def started() -> subprocess.Popen[bytes]:
        if not running:
            Store.open(service.database).close()
            with (service.home / "celery.log").open("wb") as log:
                running.append(subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log))
        return running[0]

    yield started
    for process in running:
        process.terminate()
        process.wait(60)


def wait_for(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 90
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def until(store: Store, job_id: str, reached: Callable[[Job], bool]) -> Job:
    deadline = time.monotonic() + 300
    while not reached(job := store.job(job_id)):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return job


def ended(job: Job) -> bool:
    return job.state.terminal


def story(trials: list[Trial], quality: str = "kl") -> list[tuple[Any, ...]]:
    return [(t.number, t.configuration.digest, t.origin, t.split, t.windows, t.state, t.cost, t.value(quality)) for t in trials]


@pytest.mark.timeout(900)
def test_an_interrupted_service_with_one_worker_asks_what_a_search_without_a_server_asks(
    tiny_job: Make, searched: Any, service: Settings, celery_worker: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its workers measure what a new budget is answered with, when it has ended."""
    with searched.opened() as other:
        (alone,) = [other.trials(job.id) for job in other.jobs() if job.spec["limits"] == [LOOSE]]
    with Store.open(service.database) as store:
        embedded = service.model_copy(update={"broker_url": None})
        job = store.job(submit(store, tiny_job(limits=[LOOSE]), service, owner="ada"))
        assert (job.state, job.queue, job.owner) == (JobState.PENDING, "cpu", "ada")
        with coordinating(embedded), working(embedded):
            until(store, job.id, lambda job: job.counts.succeeded >= len(alone) * 2 // 3)
        assert store.job(job.id).coordinator is None
        assert all(t.state is not State.RUNNING for t in store.trials(job.id)), "what was being evaluated is given back"
        celery_worker()
        with coordinating(service):
            job = until(store, job.id, ended)
            searched_for = store.counts(job.id).trials
            monkeypatch.setattr("autoeff.search.resolve._MEASURED", 2)
            resolution = resolve(job.id, [TIGHT], service, measure=True)
        assert (job.state, job.error) == (JobState.SUCCEEDED, None)
        workers = {attempt.worker for trial in store.trials(job.id) for attempt in store.attempts(trial.evaluation_id) if attempt.accepted}
        assert len(workers) == 2
        trials = store.trials(job.id)
        found, added = trials[:searched_for], trials[searched_for:]
        assert story(found) == story(alone)
        assert [trial.origin for trial in added if trial.split == "search"] == ["given"] * len(resolution.proposals)
        assert len(resolution.proposals) > 0
        assert all(trial.told and trial.state is State.SUCCEEDED for trial in trials)
        assert job.result is not None
        assert job.result["found"] is not None
        assert store.waiting(["cpu"]) == []
        with store.database.write() as connection:
            connection.execute(update(JobRow).values(setup_digest="of another text"))
        with pytest.raises(InputError, match="no longer what it was when it was submitted"):
            resolve(job.id, ["linear_bytes<=0.31x"], service, measure=True)
        monkeypatch.setattr(Store, "workers", lambda store: [])
        with pytest.raises(InputError, match="no worker of queue 'cpu' is there to measure"):
            resolve(job.id, ["linear_bytes<=0.31x"], service, measure=True)


@pytest.mark.timeout(300)
def test_a_worker_reserves_nothing_and_survives_messages_that_nobody_should_send(
    service: Settings, celery_worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    worker, log = celery_worker(), service.home / "celery.log"
    assert service.broker_url is not None
    with Store.open(service.database) as store:
        wait_for(lambda: any(w.alive and "cpu" in w.queues for w in store.workers()), "the worker did not announce itself")
    begun, nothing = log.read_text(), 10**6  # no evaluation has such a number
    send = sender(service.broker_url)
    with Redis.from_url(service.broker_url) as queue, Celery(broker=service.broker_url) as broker:
        broker.conf.broker_transport_options = app.conf.broker_transport_options
        with closing(sqlite3.connect(service.home / "autoeff.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # so that the first task waits while it claims
            send([Message(nothing + n, "cpu", 0) for n in range(6)])
            wait_for(lambda: queue.llen("autoeff:cpu") == 5, "one message should be taken")
            time.sleep(0.5)
            assert queue.llen("autoeff:cpu") == 5
            assert list(broker.control.inspect(timeout=2).reserved().values()) == [[]]
            other.rollback()
        for wrong in (["autoeff"], [None], [True], [], [1, 2]):
            broker.send_task("autoeff.evaluate", wrong, queue="cpu", ignore_result=True)
        broker.send_task("os.system", ["true"], queue="cpu", ignore_result=True)
        broker.send_task("autoeff.evaluate", [1], queue="cpu", serializer="pickle", ignore_result=True)
        wait_for(lambda: queue.llen("autoeff:cpu") == 0, "a message was not taken")
    send([Message(nothing, "cpu", 0)])
    wait_for(lambda: log.read_text()[len(begun) :].count("succeeded in") >= 10, "the worker takes messages no more")
    said = log.read_text()[len(begun) :]
    assert said.count("no evaluation:") == 3
    assert "Refusing to deserialize" in said
    assert "unregistered task" in said
    assert worker.poll() is None


@pytest.mark.slow
def test_a_worker_stays_at_a_job_while_that_saves_opening_models(tiny_job: Make, settings: Settings, store: Store) -> None:
    small = {"knobs": {"skip": {}}, "sampler": "random", "budget": {"trials": 14}}
    jobs = [submit(store, tiny_job(**small, seed=seed), settings) for seed in (0, 1)]  # of different windows
    with coordinating(settings), working(settings):
        for job_id in jobs:
            assert until(store, job_id, ended).state is JobState.SUCCEEDED
    attempts = [(a.started_at, job_id) for job_id in jobs for trial in store.trials(job_id) for a in store.attempts(trial.evaluation_id)]
    order = [job_id for _, job_id in sorted(attempts)]
    assert sum(before != after for before, after in pairwise(order)) <= 3
    assert len(order) > 20


@pytest.mark.slow
def test_a_job_is_paused_resumed_with_a_smaller_budget_and_cancelled(tiny_job: Make, settings: Settings, store: Store) -> None:
    small = {"limits": ["avg_bits<=12"], "space": {"include": ["model.layers.0.*"]}}
    spec = tiny_job(**small, budget={"trials": 60}, sampler="random")
    with coordinating(settings), working(settings):
        job = store.job(submit(store, spec, settings))
        until(store, job.id, lambda job: job.counts.succeeded >= 3)
        store.pause(job.id)
        paused = until(store, job.id, lambda job: job.coordinator is None and job.counts.open == 0)
        time.sleep(0.3)
        assert (store.job(job.id).state, store.job(job.id).counts.trials) == (JobState.PAUSED, paused.counts.trials)
        store.change_budget(job.id, {"trials": 35}, store.job(job.id).version)
        store.resume(job.id)
        until(store, job.id, lambda job: job.counts.trials > paused.counts.trials + 3)
        at_once = store.pause(job.id, at_once=True)
        assert all(trial.state is not State.RUNNING for trial in store.trials(job.id))
        assert store.waiting(["cpu"]) == []
        time.sleep(0.3)
        assert store.job(job.id).counts == at_once.counts
        store.resume(job.id)
        job = until(store, job.id, ended)
        assert (job.state, job.error) == (JobState.SUCCEEDED, None)
        assert 34 < job.counts.cost <= 35

        second = store.job(submit(store, tiny_job(**small, seed=1), settings))  # other windows, so other work
        until(store, second.id, lambda job: job.counts.succeeded >= 1)
        store.cancel(second.id)
        cancelled = until(store, second.id, ended)
        assert (cancelled.state, cancelled.counts.open) == (JobState.CANCELLED, 0)
        assert cancelled.counts.trials < 20
        assert store.waiting(["cpu"]) == []


def test_a_worker_with_another_model_does_not_evaluate_and_harms_nothing(
    tiny_job: Make, settings: Settings, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it claims is given back with a reason; once it has the same model and text, it takes part."""
    monkeypatch.setattr("autoeff.search.station._REFUSED_S", 1.0)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 400)
    small = {"knobs": {"skip": {}}, "sampler": "random", "budget": {"trials": 14}}
    job = store.job(submit(store, tiny_job(**small, data={"source": str(text), "windows": 8, "length": 16}), settings))
    with coordinating(settings):
        until(store, job.id, lambda job: job.counts.trials == 1)
        evaluation = store.trial(job.id, 0).evaluation_id
        text.write_text("another text\n" * 800)  # as on a machine where the same path leads to something else
        with working(settings):
            wait_for(lambda: len(store.attempts(evaluation)) >= 2, "it tries now and then")
            text.write_text("the cat sat on the mat\n" * 400)
            job = until(store, job.id, ended)
    assert job.state is JobState.SUCCEEDED
    assert job.counts.quarantined == 0
    *refused, accepted = store.attempts(evaluation)
    assert [attempt.outcome for attempt in refused] == ["released"] * len(refused)
    assert accepted.accepted
    reasons = [event.body["reason"] for event in store.events(job.id) if event.kind == "trial.queued"]
    assert len(reasons) == len(refused)
    assert all("has another model, text or version" in reason for reason in reasons)


def test_who_takes_a_job_up_leaves_claims_to_the_reaper_and_a_pause_in_force(
    tiny_job: Make, settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage workers have a whole lease to report; and the user may pause at any moment."""
    job = store.job(submit(store, tiny_job(), settings))
    stop = threading.Event()
    stop.set()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "reap", lambda store: pytest.fail("claims were ended"))
        with pytest.raises(Stopped, match="is to end"):
            drive(store, job.id, settings, threading.Event(), stop)
    assert store.job(job.id).state is JobState.RUNNING

    read = PlannedJob.stored

    def paused_meanwhile(job: Job) -> PlannedJob:
        store.pause(job.id)
        return read(job)

    monkeypatch.setattr(PlannedJob, "stored", paused_meanwhile)
    with pytest.raises(Stopped, match="paused"):
        drive(store, job.id, settings, threading.Event(), stop)
    assert store.job(job.id).state is JobState.PAUSED


def test_jobs_that_nobody_evaluates_make_room_for_others(tiny_job: Make, settings: Settings, store: Store) -> None:
    settings = settings.model_copy(update={"coordinated_jobs": 1})
    small = {"knobs": {"skip": {}}, "sampler": "random", "budget": {"trials": 14}}
    first, second = (submit(store, tiny_job(**small, device=device), settings) for device in ("cuda", "cpu"))
    with coordinating(settings):
        until(store, first, lambda job: job.counts.trials == 1)
        with working(settings):
            assert until(store, second, ended).state is JobState.SUCCEEDED
            until(store, first, lambda job: job.coordinator is not None)
    assert store.job(first).state is JobState.RUNNING


def test_a_job_of_another_version_has_failed(tiny_job: Make, settings: Settings, store: Store) -> None:
    job = store.job(submit(store, tiny_job(), settings))
    with store.database.write() as connection:
        connection.execute(update(JobRow).values(preflight={**job.preflight, "torch": "2.0.1+cpu"}))
    with pytest.raises(InputError, match="so submit it again"):
        drive(store, job.id, settings, threading.Event(), threading.Event())
    failed = store.job(job.id)
    assert failed.state is JobState.FAILED
    assert "with torch 2.0.1; here are" in (failed.error or "")


def baselines(planned: PlannedJob) -> list[Candidate]:
    """All that is evaluated before the search where every level does some harm."""
    guests, found = planned.guests(), []
    with suppress(StopIteration):
        batch = next(guests)
        while True:
            found += batch
            batch = guests.send([sum(candidate.indices) / 10 for candidate in batch])
    return found


def test_a_coordinator_needs_neither_the_model_nor_its_text(tiny_job: Make, settings: Settings, store: Store, tmp_path: Path) -> None:
    """What it goes by is what was planned, to the last number."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    job = tiny_job(limits=[LOOSE], knobs={"bits": {"group_size": 16}, "kv_budget": {}})
    shutil.copytree(job.model, model)
    shutil.copy(str(job.data.source), text)
    data = {"source": str(text), "windows": 8, "length": 32}
    spec = JobSpec.parse(job.model_dump(mode="json") | {"model": str(model), "data": data, "eval_data": None})
    stored = store.job(submit(store, spec, settings))
    planned = plan(spec, settings, "cpu")
    shutil.rmtree(model)
    text.unlink()
    found = PlannedJob.stored(stored)
    for name in ("digest", "notices", "sampler", "budget", "seconds", "held_out_windows", "table", "left_to_search", "least", "dense"):
        assert getattr(found, name) == getattr(planned, name), name
    assert found.limits == planned.limits
    assert found.problem.objectives == planned.problem.objectives
    assert found.space.to_json() == planned.space.to_json()
    assert baselines(found) == baselines(planned)


def test_queues_follow_from_the_device_and_the_machine(tiny_job: Make) -> None:
    assert [queue_of(tiny_job(device=device)) for device in ("cpu", "cuda")] == ["cpu", "gpu.any"]
    assert queue_of(tiny_job(device="cuda", queue="gpu.h200")) == "gpu.h200"
    with pytest.raises(InputError, match="queue 'gpu.h200' has no workers with the device 'cpu'"):
        queue_of(tiny_job(queue="gpu.h200"))
    with pytest.raises(InputError, match="'queue'"):
        tiny_job(queue="disk")
    check_queues(["cpu"])
    with pytest.raises(InputError, match="queues disk: this machine can serve cpu"):
        check_queues(["cpu", "disk"])
    with pytest.raises(InputError, match="queues are missing"):
        check_queues([])
