"""What a service lives through, with workers that compute nothing: a disk that fills, failures that are tried again."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from autoeff.errors import FailureClass
from autoeff.search.job import JobSpec
from autoeff.search.service import _Office
from autoeff.search.settings import Settings
from autoeff.search.storage import Claim, Job, JobState, State, Store
from autoeff.search.submission import submit

Make = Callable[..., JobSpec]


def module(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def simulated(root: Path) -> ModuleType:
    return module(root, "simulated")


@pytest.fixture(scope="module")
def audit(root: Path) -> Callable[..., list[str]]:
    found: Callable[..., list[str]] = module(root, "faults").audit
    return found


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "service", memory_cap_bytes=3 << 30, lease_s=1.0, poll_s=0.05)


@contextmanager
def coordinating(store: Store, settings: Settings) -> Iterator[None]:
    """A coordinator process, but in a thread and with this store."""
    stop = threading.Event()
    office = threading.Thread(target=_Office(store, settings, None, stop).run)
    office.start()
    try:
        yield
    finally:
        stop.set()
        office.join()


def until(store: Store, job_id: str, reached: Callable[[Job], bool]) -> Job:
    deadline = time.monotonic() + 120
    while not reached(job := store.job(job_id)):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return job


def small(tiny_job: Make) -> JobSpec:
    return tiny_job(limits=["avg_bits<=12"], space={"include": ["model.layers.0.*"]}, sampler="random", budget={"trials": 45})


def test_a_search_goes_on_when_a_full_disk_has_room_again(
    tiny_job: Make, simulated: ModuleType, audit: Callable[..., list[str]], settings: Settings
) -> None:
    with Store.open(settings.database) as store, simulated.Crowd(store, 2, 0.01, lease_s=1.0), coordinating(store, settings):
        job = store.job(submit(store, small(tiny_job), settings))
        until(store, job.id, lambda job: job.counts.succeeded >= 10)
        with store.database.write() as connection:  # a pragma of the one connection that writes
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        time.sleep(0.5)
        full = store.job(job.id)
        time.sleep(1.5)  # longer than every lease
        assert store.job(job.id).counts.trials <= full.counts.trials + 1, "nothing can be written"
        with store.database.write() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        ended = until(store, job.id, lambda job: job.state.terminal)
        assert (ended.state, ended.error) == (JobState.SUCCEEDED, None)
        assert audit(store, [job.id]) == []


def test_a_search_whose_failures_are_tried_again_ends_as_if_they_had_not_been(
    tiny_job: Make, simulated: ModuleType, audit: Callable[..., list[str]], settings: Settings
) -> None:
    """Failures among the baselines, too: what was proposed after them stays as it is."""
    broken = threading.Event()
    broken.set()

    class Broken(simulated.Crowd):  # type: ignore[misc, name-defined]
        def report(self, claim: Claim, seconds: float) -> None:
            if broken.is_set() and int(claim.configuration.digest, 16) % 3 == 0:
                self.store.fail(claim, FailureClass.OOM_HOST, "somebody else holds the memory", seconds=seconds)
            else:
                super().report(claim, seconds)

    with Store.open(settings.database) as store, Broken(store, 1):
        job = store.job(submit(store, small(tiny_job), settings))
        with coordinating(store, settings):
            until(store, job.id, lambda job: job.counts.succeeded + job.counts.failed >= 30)
        failed = [trial.number for trial in store.trials(job.id) if trial.state is State.FAILED]
        assert len(failed) > 3
        assert store.trial(job.id, failed[0]).origin != "searched"
        before = [trial.configuration for trial in store.trials(job.id)]
        broken.clear()
        with coordinating(store, settings):
            until(store, job.id, lambda job: job.coordinator is not None)
            store.retry_failed(job.id)  # while it is driven
            ended = until(store, job.id, lambda job: job.state.terminal)
        assert (ended.state, ended.error, ended.counts.failed) == (JobState.SUCCEEDED, None, 0)
        trials = store.trials(job.id)
        assert [trial.configuration for trial in trials[: len(before)]] == before
        assert {trial.number for trial in trials if trial.earlier} >= set(failed)
        assert all(trial.state is State.SUCCEEDED and trial.told for trial in trials)
        assert ended.counts.cost <= 45
        assert audit(store, [job.id]) == []
