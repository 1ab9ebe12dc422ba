"""Breaks every part of a running service, one after the other, in the middle of a search, and audits what is left.

    python benchmarks/faults.py [--moments 3] [--seed 0] [--out FILE [--add]]

Throw-away PostgreSQL and Redis, the API, two coordinators and two Celery workers, of which some have a clock that is two hours wrong.
Searches of the bundled model are submitted over REST, one after the other. At every fault, a kill at one of the steps named in
`traps/sitecustomize.py` or a thing done to a whole part, the search must go on by itself; at the end the tables must tell one story, and the
values must be those of a process of its own. Faults come in threes, each while the service recovers from those before. The file is written
anew after every round of all faults.
"""

from __future__ import annotations

import contextlib
import datetime
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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import psutil
import redis
import torch
import typer
from celery import Celery
from sqlalchemy import func, select

from autoeff.client import Client
from autoeff.errors import StorageError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest
from autoeff.search.celery_app import app
from autoeff.search.job import JobSpec
from autoeff.search.keys import LOCAL, SCOPES
from autoeff.search.results import all_trials
from autoeff.search.settings import Settings
from autoeff.search.storage import Job, State, Store
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.leases import LOSSES_TO_QUARANTINE
from autoeff.search.storage.tables import AttemptRow, EvaluationRow, EventRow, JobRow, OutboxRow, TrialRow

LEASE_S = 1.0
HERE = Path(__file__).parent
TEXT = HERE.parent / "docs" / "service.md"  # any text does, and a short one is tokenised soon, in every process
JOB = {
    "model": "demo", "data": {"source": str(TEXT), "windows": 2, "length": 64}, "knobs": {"bits": {}, "skip": {}},
    "space": {"include": ["model.layers.0.*", "model.layers.1.*"]}, "limits": ["linear_bytes<=0.9x"], "budget": {"trials": 40},
    "sampler": "nsga2",
}  # fmt: skip
WAIT_S = 300.0
TOGETHER = 3
QUEUE = "autoeff:cpu"  # of Celery in Redis
CLOCKS = ("0", "7200", "-7200")  # how far those of the processes are ahead, in turn; leases go by the database's


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


servers, traps = _module(HERE / "servers.py"), _module(HERE / "traps" / "sitecustomize.py")


class Cluster:
    """Servers, API, coordinators and workers, and the searches that they do.

    Attributes:
        spec: What is searched, each time with another seed.
        store: The database.
        jobs: Ids of the searches; the last one is under way, or was.
        checked: How many of them were found to be in order.
    """

    def __init__(self, folder: Path, postgres: Any, redis: Any, database: str, spec: JobSpec, seed: int) -> None:
        self.folder, self.postgres, self.redis, self.spec = folder, postgres, redis, spec
        assert spec.data.source is not None
        variables = {
            "AUTOEFF_HOME": str(folder / "home"), "AUTOEFF_DATABASE_URL": database, "AUTOEFF_BROKER_URL": redis.url,
            "AUTOEFF_LEASE_S": str(LEASE_S), "AUTOEFF_RESEND_S": "1", "AUTOEFF_POLL_S": "0.2", "OMP_NUM_THREADS": "1",
            "AUTOEFF_MEMORY_CAP_BYTES": str(3 << 30), "AUTOEFF_MODEL_ROOTS": str(Path(spec.model).parent.resolve()),
            "AUTOEFF_DATA_ROOTS": str(Path(spec.data.source).parent), "PYTHONPATH": str(HERE / "traps"), "TRAPS": str(folder),
        }  # fmt: skip
        environment = {**os.environ, **variables}
        self.settings = Settings(
            home=folder / "home", database_url=database, broker_url=redis.url, lease_s=LEASE_S, memory_cap_bytes=3 << 30
        )
        self.store = Store.open(database)
        key = KeyRing(self.store.database).make("faults", LOCAL, SCOPES)[1].text
        self._port = servers.free_port()
        self._client = Client(f"http://127.0.0.1:{self._port}", key, attempts=100)
        self._random = random.Random(seed)
        self.jobs: list[str] = []
        self.checked = 0
        self.processes: dict[str, list[psutil.Process]] = {verb: [] for verb in traps.STEPS}
        self.started = 0
        self._pool = ThreadPoolExecutor(1)
        self._submission: Future[None] | None = None
        for verb in traps.STEPS:
            (folder / "traps" / verb).mkdir(parents=True)
        self._template = subprocess.Popen(
            [sys.executable, str(HERE / "command_forks.py")], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, verb: str) -> None:
        """One more process of `autoeff VERB`."""
        self.started += 1
        flags = ["--no-coordinator", "--port", str(self._port)] if verb == "serve" else []
        own = {"TRAPS": str(self.folder / "traps" / verb), "CLOCK_AHEAD_S": CLOCKS[self.started % len(CLOCKS)]}
        order = [[verb, *flags], own, str(self.folder / f"{self.started}-{verb}.log")]
        assert self._template.stdin is not None
        assert self._template.stdout is not None
        self._template.stdin.write(json.dumps(order) + "\n")
        self._template.stdin.flush()
        pid = int(self._template.stdout.readline())
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
            self.processes[verb].append(psutil.Process(pid))
            return
        self.start(verb)

    def replace_dead(self) -> None:
        """Starts as many processes as have ended."""
        for verb, group in self.processes.items():
            for process in [process for process in group if not process.is_running()]:
                group.remove(process)
                self.start(verb)

    def submit(self) -> None:
        """One more search, submitted over REST; the request is repeated until it is answered."""
        spec = self.spec.model_copy(update={"seed": self._random.randrange(1 << 30)})
        self.jobs.append(self._client.submit(spec).job)

    def begin_submission(self) -> None:
        """One more search, which is submitted while other things happen; at most one at a time."""
        if self._submission is None or self._submission.done():
            self.settle()
            self._submission = self._pool.submit(self.submit)

    def settle(self) -> None:
        """Waits until what is being submitted is answered."""
        if self._submission is not None:
            while not self._submission.done():
                self.replace_dead()
                time.sleep(0.02)
            self._submission.result()

    def keep_busy(self) -> None:
        """One more search where the last one ends soon; waits for it where the last one has ended."""
        idle = self._submission is None or self._submission.done()
        last = seen(self.store, self.jobs[-1])
        if idle and (last.state.terminal or last.counts.cost > 0.8 * self.spec.budget.trials):
            self.begin_submission()
        if last.state.terminal:
            self.settle()

    def stop(self) -> None:
        """Ends all of them in order."""
        self._pool.shutdown()
        self._client.close()
        self.store.close()
        everybody = [process for group in self.processes.values() for process in group]
        for process in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(everybody, timeout=30)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait()
        self._template.communicate()

    def pool(self) -> list[psutil.Process]:
        """The processes of the workers that evaluate."""
        return [child for child in self._of_workers() if not _forks(child)]

    def fork_servers(self) -> list[psutil.Process]:
        """What forks runners for those."""
        return [child for child in self._of_workers() if _forks(child)]

    def runners(self) -> list[psutil.Process]:
        return [child for server in self.fork_servers() for child in _children(server)]

    def _of_workers(self) -> list[psutil.Process]:
        return [child for one in self.processes["worker"] for child in _children(one)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def _forks(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return "autoeff.evaluators.fork_server" in process.cmdline()
    return False


def worker_killed(cluster: Cluster, rng: random.Random) -> None:
    _replaced(cluster, [rng.choice(cluster.processes["worker"])])


def pool_process_killed(cluster: Cluster, rng: random.Random) -> None:
    _signal(cluster.pool(), signal.SIGKILL, rng)


def runner_killed(cluster: Cluster, rng: random.Random) -> None:
    _signal(cluster.runners(), signal.SIGKILL, rng)


def fork_server_killed(cluster: Cluster, rng: random.Random) -> None:
    _signal(cluster.fork_servers(), signal.SIGKILL, rng)


def worker_stopped_past_its_lease(cluster: Cluster, rng: random.Random) -> None:
    stopped = _signal(cluster.pool(), signal.SIGSTOP, rng)
    time.sleep(1.5 * LEASE_S)
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its worker, which an earlier fault has killed
            process.send_signal(signal.SIGCONT)


def coordinator_killed(cluster: Cluster, rng: random.Random) -> None:
    _replaced(cluster, cluster.processes["coordinator"][:-1])  # whoever drives the job, and not only who does not


def every_coordinator_killed(cluster: Cluster, rng: random.Random) -> None:
    _replaced(cluster, cluster.processes["coordinator"])


def api_killed(cluster: Cluster, rng: random.Random) -> None:
    cluster.begin_submission()
    time.sleep(rng.uniform(0.0, 0.2))
    _replaced(cluster, cluster.processes["serve"])


def redis_emptied(cluster: Cluster, rng: random.Random) -> None:
    with redis.Redis.from_url(cluster.redis.url) as client:
        client.flushall()


def redis_killed(cluster: Cluster, rng: random.Random) -> None:
    _away(cluster.redis, signal.SIGKILL, rng.uniform(0.0, 1.0))


def redis_frozen(cluster: Cluster, rng: random.Random) -> None:
    _frozen(cluster.redis, LEASE_S)


def messages_repeated(cluster: Cluster, rng: random.Random) -> None:
    sender = Celery(broker=cluster.redis.url)
    sender.conf.broker_transport_options = app.conf.broker_transport_options
    with cluster.store.database.read() as connection:
        ids = connection.execute(select(EvaluationRow.id).order_by(EvaluationRow.id.desc()).limit(10)).scalars().all()
    for evaluation_id in rng.sample([*ids, *(i + 1 for i in ids[:1])] * 5, 5 * len(ids)):  # done, running, and not there yet
        sender.send_task("autoeff.evaluate", (evaluation_id,), queue="cpu", ignore_result=True)
    sender.close()


def messages_shuffled(cluster: Cluster, rng: random.Random) -> None:
    messages_repeated(cluster, rng)  # few wait by themselves
    until = time.monotonic() + LEASE_S
    with redis.Redis.from_url(cluster.redis.url) as client:
        while time.monotonic() < until:
            if messages := client.lrange(QUEUE, 0, -1):
                with client.pipeline() as at_once:
                    at_once.delete(QUEUE).rpush(QUEUE, *rng.sample(messages, len(messages))).execute()
            time.sleep(0.1)


def messages_dropped(cluster: Cluster, rng: random.Random) -> None:
    until = time.monotonic() + LEASE_S
    with redis.Redis.from_url(cluster.redis.url) as client:
        while time.monotonic() < until:
            client.delete(QUEUE)


def killed_at(verb: str, step: str) -> Callable[[Cluster, random.Random], None]:
    """Kills whoever comes to this step next."""

    def fault(cluster: Cluster, rng: random.Random) -> None:
        (cluster.folder / "traps" / verb / step).touch()
        if verb == "serve":
            cluster.begin_submission()
        if step == "runner_opening":  # it has been open for long
            _signal(cluster.runners(), signal.SIGKILL, rng)

    return fault


def postgres_stopped_at_once(cluster: Cluster, rng: random.Random) -> None:
    _away(cluster.postgres, signal.SIGQUIT, rng.uniform(0.0, 1.0))


def postgres_away_past_the_lease(cluster: Cluster, rng: random.Random) -> None:
    _away(cluster.postgres, signal.SIGQUIT, 1.5 * LEASE_S)


def postgres_frozen_past_the_lease(cluster: Cluster, rng: random.Random) -> None:
    _frozen(cluster.postgres, 1.5 * LEASE_S)


FAULTS: Mapping[str, Callable[[Cluster, random.Random], None]] = {
    fault.__name__: fault
    for fault in (
        messages_repeated, messages_shuffled, messages_dropped, worker_killed, redis_emptied, pool_process_killed, coordinator_killed,
        runner_killed, fork_server_killed, worker_stopped_past_its_lease, postgres_stopped_at_once, redis_killed, every_coordinator_killed,
        api_killed, postgres_away_past_the_lease, redis_frozen, postgres_frozen_past_the_lease,
    )
} | {f"{verb}_killed_at_{step}": killed_at(verb, step) for verb, steps in traps.STEPS.items() for step in steps}  # fmt: skip


def _replaced(cluster: Cluster, victims: Sequence[psutil.Process]) -> None:
    """Kills these processes, and starts as many."""
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        victim.wait()
    cluster.replace_dead()


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
    """Faults that came together.

    Attributes:
        after: Trials of the search under way that had ended.
        recovered_s: Seconds from then until two more had.
    """

    faults: tuple[str, ...]
    after: int
    recovered_s: float


def batched(items: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


@contextlib.contextmanager
def running(folder: Path, postgres: Any, redis: Any, database: str, spec: JobSpec, seed: int = 0) -> Iterator[Cluster]:
    """A cluster with the API, two coordinators, two workers, and a search under way.

    Raises:
        AssertionError: At the end something that a worker has started is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, postgres, redis, database, spec, seed)
    try:
        for verb in ("serve", "worker", "coordinator", "coordinator"):
            cluster.start(verb)
        cluster.submit()
        cluster.start("worker")
        yield cluster
        left = [*cluster.pool(), *cluster.fork_servers(), *cluster.runners()]
    finally:
        cluster.stop()
    assert not [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE], "processes of workers are left"


def break_everything(cluster: Cluster, faults: Sequence[str], rng: random.Random, at_once: int) -> list[Moment]:
    """Searches while these faults happen, so many at once; there is always a search to break.

    Raises:
        AssertionError: A search did not go on after one of them, or did not end well.
    """
    moments = []
    for together in batched(faults, at_once):
        for fault in together:
            time.sleep(rng.uniform(0.0, 0.1))
            cluster.keep_busy()
            FAULTS[fault](cluster, rng)
            cluster.replace_dead()
        spring(cluster)
        started = time.monotonic()
        cluster.keep_busy()
        job_id = cluster.jobs[-1]
        before = ended(cluster, job_id, 0, str(together))
        ended(cluster, job_id, before + 2, str(together))
        moments.append(Moment(together, before, round(time.monotonic() - started, 2)))
    cluster.settle()
    for job_id in cluster.jobs:
        ended(cluster, job_id, sys.maxsize, "the last fault")
    return moments


def spring(cluster: Cluster) -> None:
    """Waits until somebody was killed at every step where that is to be."""
    deadline = time.monotonic() + WAIT_S
    while left := list((cluster.folder / "traps").glob("*/*")):
        assert time.monotonic() < deadline, f"nobody came to {', '.join(trap.name for trap in left)}"
        if any(trap.parent.name == "serve" for trap in left):
            cluster.begin_submission()
        cluster.keep_busy()
        cluster.replace_dead()
        time.sleep(0.02)


def ended(cluster: Cluster, job_id: str, count: int, what: str) -> int:
    """Waits until so many trials, or the job, have ended; returns how many trials have.

    A process that found no database when it began has ended, and is started again, as by any supervisor.
    """
    deadline = time.monotonic() + WAIT_S
    while True:
        cluster.replace_dead()
        job = seen(cluster.store, job_id)
        done = job.counts.trials - job.counts.open
        if done >= count or job.state.terminal:
            assert job.error is None, job.error
            return done
        assert time.monotonic() < deadline, f"{what}: {done} of {count} trials ended in {WAIT_S:g} s; {job.state}, {job.counts}"
        time.sleep(0.1)


def seen(store: Store, job_id: str) -> Job:
    """The job, as soon as the database answers."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return store.job(job_id)
        except StorageError:
            assert time.monotonic() < deadline, f"the database has not answered for {WAIT_S:g} s"
            time.sleep(0.1)


def audit(store: Store, submitted: Sequence[str]) -> list[str]:
    """What is wrong with the tables at rest, one line each, where these jobs were submitted."""
    wrong = []
    with store.database.read() as connection:
        if waiting := connection.execute(select(func.count()).select_from(OutboxRow)).scalar_one():
            wrong.append(f"{waiting} messages are still to be sent")
        evaluations = connection.execute(select(EvaluationRow.__table__)).all()
        attempts = connection.execute(select(AttemptRow.__table__).order_by(AttemptRow.evaluation_id, AttemptRow.fence)).all()
        jobs = connection.execute(select(JobRow.__table__)).all()
        trials = connection.execute(select(TrialRow.__table__).order_by(TrialRow.job_id, TrialRow.number)).all()
        events = connection.execute(select(EventRow.__table__).order_by(EventRow.job_id, EventRow.seq)).all()
    if sorted(job.id for job in jobs) != sorted(submitted):
        wrong.append(f"the jobs are {[job.id for job in jobs]}, submitted were {list(submitted)}")
    state = {row.id: row.state for row in evaluations}
    for row in evaluations:
        mine = [a for a in attempts if a.evaluation_id == row.id]
        if row.state not in (State.SUCCEEDED, State.FAILED, State.QUARANTINED):
            wrong.append(f"evaluation {row.id} is {row.state}")
        decided = [a.fence for a in mine if a.outcome in ("succeeded", "failed")]
        if row.state is State.QUARANTINED:  # hit three times: then the last loss decides
            decided += [a.fence for a in mine if a.outcome == "lost"][LOSSES_TO_QUARANTINE - 1 :]
        if decided != [row.accepted_fence]:
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


def tally(store: Store) -> dict[str, int]:
    """How much there was to be lost."""
    with store.database.read() as connection:
        states = Counter(connection.execute(select(EvaluationRow.state)).scalars())
        attempts = Counter(connection.execute(select(AttemptRow.outcome)).scalars())
        jobs = connection.execute(select(func.count()).select_from(JobRow)).scalar_one()
    return {"jobs": jobs, "evaluations": states.total(), "quarantined": states[State.QUARANTINED], "attempts_lost": attempts["lost"]}


def same_values(store: Store, job_id: str, settings: Settings, count: int) -> None:
    """Measures some of the job's trials again in this process.

    Raises:
        AssertionError: A value differs.
    """
    torch.set_num_threads(1)  # as in the workers; sums depend on it
    evaluator = Evaluator(JobSpec.parse(store.job(job_id).spec).setup(settings.bank))
    trials = [trial for trial in all_trials(store, job_id) if trial.state is State.SUCCEEDED]
    for trial in trials[:: max(1, len(trials) // count)]:
        found = evaluator.evaluate(EvaluationRequest(trial.configuration.levels, trial.split, trial.windows))
        for item in found:
            stored = next(m for m in trial.measurements if (m.name, m.split) == (item.name, item.split))
            assert abs(item.value - stored.value) <= 1e-6 * abs(stored.value) + 1e-9, (trial.number, item, stored)


def check(cluster: Cluster, faults: Sequence[str], rng: random.Random, at_once: int = TOGETHER) -> tuple[list[Moment], Counter[str]]:
    """Searches with these faults; returns their moments, and the evaluations of each worker.

    Raises:
        AssertionError: Something was lost, doubled or stuck.
    """
    moments = break_everything(cluster, faults, rng, at_once)
    wrong = audit(cluster.store, cluster.jobs)
    assert not wrong, "\n".join(wrong)
    jobs, cluster.checked = cluster.jobs[cluster.checked :], len(cluster.jobs)
    same_values(cluster.store, jobs[0], cluster.settings, count=8)
    ids = {trial.evaluation_id for job_id in jobs for trial in all_trials(cluster.store, job_id)}
    return moments, Counter(a.worker.split("/")[2] for a in cluster.store.attempts(*ids) if a.accepted)


def main(
    moments: Annotated[int, typer.Option(help="Of every fault.")] = 3,
    seed: Annotated[int, typer.Option(help="Of moments and victims.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file, a run in a list.")] = None,
    add: Annotated[bool, typer.Option(help="Keep the runs that it has.")] = False,
) -> None:
    rng = random.Random(seed)
    begun = time.monotonic()
    done: list[Moment] = []
    earlier = json.loads(out.read_text()) if add and out is not None and out.exists() else []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres, redis = (stack.enter_context(make()) for make in (servers.postgres_server, servers.redis_server))
        database = servers.new_database(postgres)
        cluster = stack.enter_context(running(folder, postgres, redis, database, JobSpec.parse(JOB), seed))
        for round_ in range(moments):
            found, workers = check(cluster, rng.sample(sorted(FAULTS), len(FAULTS)), rng)
            done += found
            for moment in found:
                print(f"after {moment.after:4d} trials, went on in {moment.recovered_s:5.1f} s: {', '.join(moment.faults)}", flush=True)
            print(
                f"round {round_}, {time.monotonic() - begun:.0f} s: nothing lost, nothing double; evaluations by process {dict(workers)}",
                flush=True,
            )
            if out is not None:
                run = {
                    "date": datetime.date.today().isoformat(), "seed": seed, "lease_s": LEASE_S, "rounds": round_ + 1, "faults": len(FAULTS),
                    "seconds": round(time.monotonic() - begun), "load": os.getloadavg()[0], **tally(cluster.store),
                    "moments": [asdict(moment) for moment in done],
                }  # fmt: skip
                out.write_text(json.dumps([*earlier, run], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
