"""A service that is broken part by part in the middle of a search: one round of `benchmarks/faults.py`."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import update

from autoeff.search.job import JobSpec
from autoeff.search.storage import Store
from autoeff.search.storage.tables import JobRow

AT_ONCE = 5
ONCE = (
    "coordinator_killed_at_before_proposal", "worker_killed_at_claim_uncommitted", "coordinator_killed_at_proposal_uncommitted",
    "worker_killed_at_message_taken", "messages_repeated",
    "serve_killed_at_job_uncommitted", "coordinator_killed_at_proposal_committed", "postgres_away_past_the_lease", "api_killed",
    "worker_killed_at_claim_committed",
    "redis_killed", "coordinator_killed_at_sampler_told", "messages_dropped", "worker_killed_at_runner_opening",
    "coordinator_killed_at_before_message",
    "worker_killed", "coordinator_killed_at_before_end", "worker_stopped_past_its_lease", "redis_frozen",
    "coordinator_killed_at_message_sent",
    "serve_killed_at_job_committed", "postgres_frozen_past_the_lease", "postgres_stopped_at_once", "worker_killed_at_runner_evaluating",
    "redis_emptied",
    "worker_killed_at_result_uncommitted", "messages_shuffled", "coordinator_killed", "worker_killed_at_result_committed",
    "runner_killed",
    "fork_server_killed", "every_coordinator_killed", "worker_killed_at_runner_measured", "pool_process_killed",
)  # fmt: skip
"""In an order in which what takes long to come back, such as an API after a kill, does so while others wait for an outage to end, and no
candidate is hit three times by those that come at once."""


@pytest.fixture(scope="module")
def faults(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", root / "benchmarks" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["faults"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(600)
def test_a_service_that_is_broken_part_by_part_loses_and_doubles_nothing(
    faults: ModuleType, servers: ModuleType, tmp_path: Path, tiny_job: Callable[..., JobSpec]
) -> None:
    few = {"include": ["model.layers.0.*"]}
    spec = tiny_job(limits=["linear_bytes<=0.9x"], sampler="nsga2", budget={"trials": 25}, space=few)
    assert sorted(ONCE) == sorted(faults.FAULTS)
    with servers.postgres_server() as postgres, servers.redis_server() as redis:  # its own, since they are killed
        with faults.running(tmp_path, postgres, redis, postgres.url, spec) as cluster:
            moments, workers = faults.check(cluster, ONCE, random.Random(0), AT_ONCE)
        assert tuple(fault for moment in moments for fault in moment.faults) == ONCE
        assert len(workers) >= 2
        with Store.open(postgres.url) as store, store.database.write() as connection:
            connection.execute(update(JobRow).values(events=JobRow.events + 1, succeeded=JobRow.succeeded - 1))
        with Store.open(postgres.url) as store:
            wrong = faults.audit(store, [job.id for job in store.jobs()][1:])
    assert any("events have gaps" in line for line in wrong), "the auditor sees what is wrong"
    assert any("counts" in line for line in wrong)
    assert any("submitted were" in line for line in wrong)
