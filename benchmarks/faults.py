"""Breaks every part of a running service, one after the other, in the middle of a search, and audits what is left.

    python benchmarks/faults.py [--moments 3] [--seed 0] [--out FILE]

Throw-away PostgreSQL and Redis, two coordinators and two Celery workers evaluate searches of the bundled model, one after the other. At
every fault the search must go on by itself; at the end the tables must tell one story, and the values must be those of a process of its
own. The file is written anew after every round of all faults.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import psutil
import typer
from sqlalchemy import func, select

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.job import JobSpec
from autoeff.search.results import all_trials
from autoeff.search.service import submit
from autoeff.search.settings import Settings
from autoeff.search.storage import State, Store
from autoeff.search.storage.tables import AttemptRow, EvaluationRow, EventRow, JobRow, OutboxRow, TrialRow

LEASE_S = 3.0
TEXT = str(Path(__file__).parents[1] / "docs" / "service.md")  # any text does, and a short one is tokenised soon, in every process
JOB = {
    "model": "demo", "data": {"source": TEXT, "windows": 8, "length": 64}, "knobs": {"bits": {}, "skip": {}},
    "limits": ["linear_bytes<=0.25x"], "budget": {"trials": 45}, "sampler": "nsga2",
}  # fmt: skip
WAIT_S = 300.0


def _servers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("servers", Path(__file__).with_name("servers.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["servers"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Cluster:
    """Servers, coordinators and workers of one test."""

    def __init__(self, folder: Path, postgres: Any, redis: Any, database: str) -> None:
        self.folder, self.postgres, self.redis = folder, postgres, redis
        variables = {
            "AUTOEFF_HOME": str(folder / "home"), "AUTOEFF_DATABASE_URL": database, "AUTOEFF_BROKER_URL": redis.url,
            "AUTOEFF_LEASE_S": str(LEASE_S), "AUTOEFF_RESEND_S": "1", "AUTOEFF_POLL_S": "0.2", "OMP_NUM_THREADS": "1",
            "AUTOEFF_MEMORY_CAP_BYTES": str(3 << 30),
        }  # fmt: skip
        self.environment = {**os.environ, **variables}
        self.settings = Settings(
            home=folder / "home", database_url=database, broker_url=redis.url, lease_s=LEASE_S, memory_cap_bytes=3 << 30
        )
        self.processes: dict[str, list[subprocess.Popen[bytes]]] = {"coordinator": [], "worker": []}
        self.started = 0

    def start(self, verb: str) -> None:
        """One more process of `autoeff VERB`."""
        self.started += 1
        with (self.folder / f"{self.started}-{verb}.log").open("wb") as log:
            command = [sys.executable, "-m", "autoeff.cli", verb]
            self.processes[verb].append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True))

    def stop(self) -> None:
        """Ends all of them in order."""
        everybody = [process for group in self.processes.values() for process in group]
        for process in everybody:
            process.terminate()
        for process in everybody:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def alive(self, verb: str) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes[verb] if process.poll() is None]

    def children(self, depth: int) -> list[psutil.Process]:
        """Of the workers: processes of their pools (1), or the runners of those (2)."""
        found = [psutil.Process(process.pid) for process in self.alive("worker")]
        for _ in range(depth):
            found = [child for process in found for child in _children(process)]
        return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def worker_killed(cluster: Cluster, rng: random.Random) -> None:
    _replaced(cluster, "worker", [rng.choice(cluster.alive("worker"))])


def pool_process_killed(cluster: Cluster, rng: random.Random) -> None:
    _signal(cluster.children(1), signal.SIGKILL, rng)


def runner_killed(cluster: Cluster, rng: random.Random) -> None:
    _signal(cluster.children(2), signal.SIGKILL, rng)


def worker_stopped_past_its_lease(cluster: Cluster, rng: random.Random) -> None:
    stopped = _signal(cluster.children(1), signal.SIGSTOP, rng)
    time.sleep(1.5 * LEASE_S)
    for process in stopped:
        process.send_signal(signal.SIGCONT)


def coordinator_killed(cluster: Cluster, rng: random.Random) -> None:
    _replaced(cluster, "coordinator", cluster.alive("coordinator")[:-1])  # whoever drives the job, and not only who does not


def every_coordinator_killed(cluster: Cluster, rng: random.Random) -> None:
    _replaced(cluster, "coordinator", cluster.alive("coordinator"))


def redis_emptied(cluster: Cluster, rng: random.Random) -> None:
    import redis

    with redis.Redis.from_url(cluster.redis.url) as client:
        client.flushall()


def redis_killed(cluster: Cluster, rng: random.Random) -> None:
    _away(cluster.redis, signal.SIGKILL, rng.uniform(0.0, 1.0))


def redis_frozen(cluster: Cluster, rng: random.Random) -> None:
    _frozen(cluster.redis, LEASE_S)


def messages_repeated(cluster: Cluster, rng: random.Random) -> None:
    from celery import Celery

    from autoeff.search.celery_app import app

    sender = Celery(broker=cluster.redis.url)
    sender.conf.broker_transport_options = app.conf.broker_transport_options
    with Store.open(cluster.settings.database) as store, store.database.read() as connection:
        ids = connection.execute(select(EvaluationRow.id).order_by(EvaluationRow.id.desc()).limit(10)).scalars().all()
    for evaluation_id in rng.sample([*ids, *(i + 1 for i in ids[:1])] * 5, 5 * len(ids)):  # done, running, and not there yet
        sender.send_task("autoeff.evaluate", (evaluation_id,), queue="cpu", ignore_result=True)
    sender.close()


def postgres_stopped_at_once(cluster: Cluster, rng: random.Random) -> None:
    _away(cluster.postgres, signal.SIGQUIT, rng.uniform(0.0, 1.0))


def postgres_away_past_the_lease(cluster: Cluster, rng: random.Random) -> None:
    _away(cluster.postgres, signal.SIGQUIT, 1.5 * LEASE_S)


def postgres_frozen_past_the_lease(cluster: Cluster, rng: random.Random) -> None:
    _frozen(cluster.postgres, 1.5 * LEASE_S)


FAULTS: Mapping[str, Callable[[Cluster, random.Random], None]] = {
    fault.__name__: fault
    for fault in (
        messages_repeated, worker_killed, redis_emptied, pool_process_killed, coordinator_killed, runner_killed,
        worker_stopped_past_its_lease, postgres_stopped_at_once, redis_killed, every_coordinator_killed, postgres_away_past_the_lease,
        redis_frozen, postgres_frozen_past_the_lease,
    )
}  # fmt: skip


def _replaced(cluster: Cluster, verb: str, victims: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kills these processes, and starts as many."""
    for victim in victims:
        victim.kill()
        victim.wait()
        cluster.start(verb)


def _away(server: Any, number: int, seconds: float) -> None:
    """Ends a server for a while; who is connected hears of it."""
    server.stop(number)
    time.sleep(seconds)
    server.start()


def _frozen(server: Any, seconds: float) -> None:
    """Stops a server in its tracks, as a network that is cut does: who is connected hears nothing."""
    process = psutil.Process(server.process.pid)
    stopped = [process, *process.children(recursive=True)]
    for number, pause_s in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0.0)):
        for one in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):  # a connection has ended
                one.send_signal(number)
        time.sleep(pause_s)


def _signal(processes: Sequence[psutil.Process], number: int, rng: random.Random) -> list[psutil.Process]:
    chosen = rng.sample(processes, min(1, len(processes)))
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return chosen


@dataclass(frozen=True)
class Moment:
    """One fault.

    Attributes:
        after: Trials that had ended.
        recovered_s: Seconds from then until two more had.
    """

    fault: str
    after: int
    recovered_s: float


@contextlib.contextmanager
def running(folder: Path, postgres: Any, redis: Any, database: str) -> Iterator[Cluster]:
    """A cluster with two coordinators and two workers.

    Raises:
        AssertionError: At the end a runner is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, postgres, redis, database)
    try:
        for verb in ("coordinator", "worker", "coordinator", "worker"):
            cluster.start(verb)
        yield cluster
        runners = cluster.children(2)
    finally:
        cluster.stop()
    assert not [runner for runner in runners if runner.is_running() and runner.status() != psutil.STATUS_ZOMBIE], "runners are left"


def break_everything(cluster: Cluster, spec: JobSpec, faults: Sequence[str], seed: int) -> tuple[list[str], list[Moment]]:
    """Searches while these faults happen, one after the other; returns the jobs and what the faults were like.

    A search that has ended is followed by one of another seed: there is always one to break.

    Raises:
        AssertionError: A search did not go on after one of them, or did not end well.
    """
    rng = random.Random(seed)
    jobs: list[str] = []
    moments = []
    for fault in faults:
        time.sleep(rng.uniform(0.0, 0.5))
        with Store.open(cluster.settings.database) as store:
            if not jobs or store.job(jobs[-1]).state.terminal:
                jobs.append(submit(store, spec.model_copy(update={"seed": rng.randrange(1 << 30)}), cluster.settings).id)
                ended(store, jobs[-1], 2, "the start")
            before = ended(store, jobs[-1], 0, fault)
        FAULTS[fault](cluster, rng)
        started = time.monotonic()
        with Store.open(cluster.settings.database) as store:
            ended(store, jobs[-1], before + 2, fault)
            moments.append(Moment(fault, before, round(time.monotonic() - started, 2)))
    with Store.open(cluster.settings.database) as store:
        for job_id in jobs:
            ended(store, job_id, sys.maxsize, "the last fault")
    return jobs, moments


def ended(store: Store, job_id: str, count: int, what: str) -> int:
    """Waits until so many trials, or the job, have ended; returns how many trials have."""
    deadline = time.monotonic() + WAIT_S
    while True:
        job = store.job(job_id)
        done = job.counts.trials - job.counts.open
        if done >= count or job.state.terminal:
            assert job.error is None, job.error
            return done
        assert time.monotonic() < deadline, f"{what}: {done} of {count} trials ended in {WAIT_S:g} s; {job.state}, {job.counts}"
        time.sleep(0.1)


def audit(store: Store) -> list[str]:
    """What is wrong with the tables at rest, one line each."""
    wrong = []
    with store.database.read() as connection:
        if waiting := connection.execute(select(func.count()).select_from(OutboxRow)).scalar_one():
            wrong.append(f"{waiting} messages are still to be sent")
        evaluations = connection.execute(select(EvaluationRow.__table__)).all()
        attempts = connection.execute(select(AttemptRow.__table__).order_by(AttemptRow.evaluation_id, AttemptRow.fence)).all()
        jobs = connection.execute(select(JobRow.__table__)).all()
        trials = connection.execute(select(TrialRow.__table__).order_by(TrialRow.job_id, TrialRow.number)).all()
        events = connection.execute(select(EventRow.__table__).order_by(EventRow.job_id, EventRow.seq)).all()
    state = {row.id: row.state for row in evaluations}
    for row in evaluations:
        mine = [a for a in attempts if a.evaluation_id == row.id]
        if row.state not in (State.SUCCEEDED, State.FAILED):
            wrong.append(f"evaluation {row.id} is {row.state}")
        if [a.fence for a in mine if a.outcome in ("succeeded", "failed")] != [row.accepted_fence]:
            wrong.append(f"evaluation {row.id}: attempts {[(a.fence, a.outcome) for a in mine]}, accepted {row.accepted_fence}")
        if row.attempts != len(mine) or any(a.outcome is None for a in mine):
            wrong.append(f"evaluation {row.id} counts {row.attempts} attempts, has {[(a.fence, a.outcome) for a in mine]}")
    keys = Counter(row.eval_key for row in evaluations if row.state is State.SUCCEEDED)
    wrong += [f"work {key} was accepted {count} times" for key, count in keys.items() if count > 1]
    for job in jobs:
        mine = [t for t in trials if t.job_id == job.id]
        story = [e for e in events if e.job_id == job.id]
        if not job.state.terminal:
            wrong.append(f"job {job.id} is {job.state}")
        if [t.number for t in mine] != list(range(job.trials)):
            wrong.append(f"job {job.id}: {job.trials} trials, numbers {[t.number for t in mine]}")
        if untold := [t.number for t in mine if t.told_at is None]:
            wrong.append(f"job {job.id}: trials {untold} were not told")
        counted = Counter(state[t.evaluation_id] for t in mine)
        if (job.succeeded, job.failed, job.quarantined) != (counted[State.SUCCEEDED], counted[State.FAILED], counted[State.QUARANTINED]):
            wrong.append(f"job {job.id} counts {job.succeeded}, {job.failed}, {job.quarantined}; its trials are {dict(counted)}")
        if abs(job.cost - sum(t.cost for t in mine)) > 1e-9 or job.cost > job.spec["budget"]["trials"]:
            wrong.append(f"job {job.id} used {job.cost} of {job.spec['budget']['trials']}, its trials {sum(t.cost for t in mine)}")
        if [e.seq for e in story] != list(range(1, job.events + 1)):
            wrong.append(f"job {job.id}: events have gaps")
        for kind in ("trial.proposed", "trial.succeeded"):
            told = Counter(e.body["trial"] for e in story if e.kind == kind)
            if set(told.values()) - {1}:
                wrong.append(f"job {job.id}: {kind} more than once for {[n for n, times in told.items() if times > 1]}")
    return wrong


def same_values(store: Store, job_id: str, settings: Settings, count: int) -> None:
    """Measures some of the job's trials again in this process.

    Raises:
        AssertionError: A value differs.
    """
    evaluator = Evaluator(JobSpec.parse(store.job(job_id).spec).setup(settings.bank))
    trials = all_trials(store, job_id)
    for trial in trials[:: max(1, len(trials) // count)]:
        found = evaluator.evaluate(EvaluationRequest(trial.configuration.levels, trial.split, trial.windows))
        for item in found:
            stored = next(m for m in trial.measurements if (m.name, m.split) == (item.name, item.split))
            assert abs(item.value - stored.value) <= 1e-6 * abs(stored.value) + 1e-9, (trial.number, item, stored)


def check(cluster: Cluster, spec: JobSpec, faults: Sequence[str], seed: int) -> tuple[list[Moment], Counter[str]]:
    """Searches with these faults; returns their moments, and the evaluations of each worker.

    Raises:
        AssertionError: Something was lost, doubled or stuck.
    """
    jobs, moments = break_everything(cluster, spec, faults, seed)
    with Store.open(cluster.settings.database) as store:
        wrong = audit(store)
        assert not wrong, "\n".join(wrong)
        same_values(store, jobs[0], cluster.settings, count=8)
        ids = {trial.evaluation_id for job_id in jobs for trial in all_trials(store, job_id)}
        workers = Counter(a.worker.split("/")[2] for a in store.attempts(*ids) if a.accepted)
    return moments, workers


def main(
    moments: Annotated[int, typer.Option(help="Of every fault.")] = 3,
    seed: Annotated[int, typer.Option(help="Of moments and victims.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    servers = _servers()
    rng = random.Random(seed)
    begun = time.monotonic()
    done: list[Moment] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres, redis = (stack.enter_context(make()) for make in (servers.postgres_server, servers.redis_server))
        cluster = stack.enter_context(running(folder, postgres, redis, servers.new_database(postgres)))
        for round_ in range(moments):
            found, workers = check(cluster, JobSpec.parse(JOB), rng.sample(sorted(FAULTS), len(FAULTS)), seed + round_)
            done += found
            for moment in found:
                print(f"{moment.fault:32s} after {moment.after:4d} trials: went on in {moment.recovered_s:5.1f} s", flush=True)
            print(
                f"round {round_}, {time.monotonic() - begun:.0f} s: nothing lost, nothing double; evaluations by process {dict(workers)}",
                flush=True,
            )
            if out is not None:
                facts = {"seed": seed, "lease_s": LEASE_S, "seconds": round(time.monotonic() - begun), "load": os.getloadavg()[0]}
                out.write_text(json.dumps(facts | {"moments": [asdict(moment) for moment in done]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
