"""The load that a service holds, against what it should hold, with real servers.

    python benchmarks/service.py [--parts submissions,claims,…] [--folder DIR]

Throw-away PostgreSQL and Redis, `autoeff serve`, `coordinator` and `worker` processes; evaluations that compute nothing are those of
`benchmarks/simulated.py`. Each part takes minutes at most. Prints a table with the target beside the value and writes
`benchmarks/results/service.json`, where parts that are not measured now stay as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx2
import psutil
import servers
import simulated
import typer
from demo_cluster import running, said
from rich.console import Console
from rich.table import Table

from autoeff.search.job import JobSpec
from autoeff.search.service import drive
from autoeff.search.settings import Settings
from autoeff.search.standing import problem_of
from autoeff.search.storage import Job, JobState, Proposal, Store
from autoeff.search.storage.keys import KeyRing
from autoeff.search.submission import submit
from autoeff.spaces.configuration import Configuration, digest_of

RESULTS = Path(__file__).parent / "results" / "service.json"
JOB: dict[str, Any] = {
    "model": "demo", "knobs": {"bits": {}, "skip": {}}, "data": {"windows": 4, "length": 64}, "eval_data": {"windows": 4, "length": 64},
    "limits": ["avg_bits<=3.5"], "budget": {"trials": 120}, "sampler": "random",
}  # fmt: skip
WAIT_S = 240.0
console = Console(width=140)


@dataclass(frozen=True)
class Measure:
    """A measured thing.

    Attributes:
        target: For people, such as `>= 100`; empty where there is none.
        met: Whether it is kept; None where there is none.
        detail: What else was seen.
    """

    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None
    detail: str = ""


def at_least(name: str, value: float, unit: str, target: float, detail: str = "") -> Measure:
    return Measure(name, value, unit, f">= {target:g}", value >= target, detail)


def at_most(name: str, value: float, unit: str, target: float, detail: str = "") -> Measure:
    return Measure(name, value, unit, f"<= {target:g}", value <= target, detail)


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("inf")


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    folder: Path
    postgres: Any
    redis: Any

    def environment(self, database: str | None = None, *, broker: bool = False, **more: str) -> dict[str, str]:
        """Of a process; without a database it has a SQLite file of its own."""
        found = {name: value for name, value in os.environ.items() if not name.startswith("AUTOEFF_")}
        found |= {"AUTOEFF_HOME": str(self.folder / "home"), "AUTOEFF_CALLS_PER_MINUTE": "0", "AUTOEFF_OPEN_JOBS": "100000"}
        found |= {"AUTOEFF_DATABASE_URL": database or self.sqlite, "AUTOEFF_POLL_S": "0.2", "OMP_NUM_THREADS": "1"}
        return found | ({"AUTOEFF_BROKER_URL": self.redis.url} if broker else {}) | more

    def settings(self, database: str | None = None) -> Settings:
        return Settings(home=self.folder / "home", database_url=database or self.sqlite, poll_s=0.2, lease_s=20.0)

    @property
    def sqlite(self) -> str:
        return f"sqlite:///{self.folder / 'autoeff.db'}"

    @contextlib.contextmanager
    def serving(self, *arguments: str, **more: str) -> Iterator[tuple[str, str]]:
        """URL and key of a server."""
        with running(self.folder / "serve.log", self.environment(**more), "serve", "--port", "0", *arguments) as server:
            url, key = said(server)
            yield listening(url), key


@contextlib.contextmanager
def script(log: Path, environment: dict[str, str], *arguments: str) -> Iterator[None]:
    """A process of `benchmarks/simulated.py`."""
    with log.open("ab") as file:
        command = [sys.executable, str(Path(__file__).with_name("simulated.py")), *arguments]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def submissions(place: Place) -> Iterator[Measure]:
    """`POST /v1/jobs`, 16 in flight, over SQLite."""
    with place.serving("--no-coordinator") as (url, key), httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as client:
        for kind, seeds in (("same seed", [0] * 400), ("seeds of their own", list(range(1, 401)))):
            while client.post("/v1/jobs", json=JOB, timeout=120).status_code != 202:  # the engine is being loaded
                time.sleep(0.5)
            seconds: list[float] = []
            failed: list[int] = []

            def one(seed: int, seconds: list[float] = seconds, failed: list[int] = failed) -> None:
                begun = time.perf_counter()
                answer = client.post("/v1/jobs", json=JOB | {"seed": seed}, timeout=120)
                seconds.append(time.perf_counter() - begun)
                if answer.status_code != 202:
                    failed.append(answer.status_code)

            started = time.perf_counter()
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(one, seeds))
            rate = len(seeds) / (time.perf_counter() - started)
            detail = f"p50 {1e3 * quantile(seconds, 0.5):.0f} ms, {len(failed)} errors"
            yield at_least(f"submissions, {kind}", rate, "/s", 100.0, detail)
            yield at_most(f"submissions, {kind}, p99", quantile(seconds, 0.99), "s", 1.0)


_CLAIMING = """
import sys, threading
from autoeff.search.storage import Store
from autoeff.spaces.measurements import Measurement
url, begin, end, threads = sys.argv[1], *map(int, sys.argv[2:])
names = ("kl", "kl_held_out", "perplexity_held_out", "spearman_held_out")
measured = [Measurement(name, 0.5, "search", 64) for name in names]
with Store.open(url) as store:
    def work(which):
        for evaluation_id in range(begin + which, end, threads):
            claim = store.claim(evaluation_id, f"simulated/none/{begin + which}/0.00", 60.0)
            assert claim is not None and store.complete(claim, measured, 0.1)
    print("ready", flush=True)
    sys.stdin.readline()
    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
"""


def claims(place: Place) -> Iterator[Measure]:
    """Evaluations through claim and complete, by 16 workers in 4 processes."""
    for kind, database, count, target in (
        ("SQLite", place.sqlite, 800, 80.0), ("PostgreSQL", servers.new_database(place.postgres), 4_000, 400.0),
    ):  # fmt: skip
        with Store.open(database) as store:
            store.create_job("job", JOB, {}, {}, "0" * 64, queue="cpu")
            fence = store.acquire_coordinator("job", "bench/none/1/0.00", 3600)
            for number in range(count):
                configuration = Configuration({"a:bits": number})
                key = digest_of(["bench", number])
                store.propose("job", fence, Proposal(number, configuration, "searched", "search", 4, 1.0, key, {"avg_bits": 3.0}, True))
        share = count // 4
        command = [sys.executable, "-c", _CLAIMING, database]
        processes = [
            subprocess.Popen(
                [*command, str(1 + n * share), str(1 + (n + 1) * share), "4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for n in range(4)
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        started = time.perf_counter()
        for process in processes:
            process.communicate("\n")
        rate = count / (time.perf_counter() - started)
        with Store.open(database) as store:
            assert store.counts("job").succeeded == count
        yield at_least(f"claim to complete, {kind}, 16 workers", rate, "/s", target, f"{count} evaluations, 4 measurements each")


def streams(place: Place) -> Iterator[Measure]:
    """500 clients that follow one job of 2 events a second; all connect again half-way."""
    clients, seconds = 500, 40.0
    with Store.open(place.sqlite) as store:
        store.create_job("0" * 12, JOB | {"budget": {"trials": 9}}, {"quality": "kl"}, {}, "0" * 64, owner="ada", queue="cpu")
        ring = KeyRing(store.database)
        keys = [ring.make(f"key {n}", "ada", ["jobs:read"])[1].text for n in range(clients // 5)]
        fence = store.acquire_coordinator("0" * 12, "bench/none/1/0.00", 3600)
        with running(place.folder / "serve.log", place.environment(), "serve", "--port", "0", "--no-coordinator") as server:
            url = said_url(server)
            over = threading.Event()

            def happen() -> None:
                while not over.wait(0.5):
                    store.tell("0" * 12, fence, "job.phase", {"phase": "search", "told": time.time()})

            teller = threading.Thread(target=happen)
            teller.start()
            try:
                delays, gaps, connected = asyncio.run(_followed(url, keys, clients, seconds))
            finally:
                over.set()
                teller.join()
    yield at_least("event streams at once", connected, "clients", clients, f"{len(delays)} events received")
    yield at_most("event delay, p99", quantile(delays, 0.99), "s", 1.0, f"p50 {1e3 * quantile(delays, 0.5):.0f} ms")
    yield at_most("events missed over a reconnect", gaps, "events", 0)


def said_url(server: Any) -> str:
    """The URL alone, of a server whose database has keys."""
    for line in server.stdout:
        if match := re.fullmatch(r"export AUTOEFF_SERVER=(\S+)\n", line):
            return listening(match[1])
    raise RuntimeError("autoeff serve ended before it served")


def listening(url: str) -> str:
    """The same URL, once its server answers; it is told before."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(httpx2.TransportError):
            httpx2.get(f"{url}/livez").raise_for_status()
            return url
        assert time.monotonic() < deadline, f"{url} does not answer"
        time.sleep(0.1)


async def _followed(url: str, keys: Sequence[str], clients: int, seconds: float) -> tuple[list[float], int, int]:
    host, port = re.fullmatch(r"http://(.+):(\d+)", url).groups()  # type: ignore[union-attr]
    delays: list[float] = []
    seen: list[list[int]] = [[] for _ in range(clients)]
    connected: set[int] = set()

    async def follow(client: int, last: int, until: float) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = [f"GET /v1/jobs/{'0' * 12}/events HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {keys[client // 5]}"]
        writer.write("\r\n".join([*lines, f"Last-Event-ID: {last}", "", ""]).encode())
        number, since = 0, float("inf")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic()):
                while line := await reader.readline():
                    if line.startswith(b"HTTP/1.1 200"):
                        connected.add(client)
                        since = time.time()
                    elif line.startswith(b"id: "):
                        number = int(line[4:])
                        seen[client].append(number)
                    elif line.startswith(b"data: ") and number:
                        told = json.loads(line[6:]).get("told")
                        if told is not None and told >= since:  # replays are not delays
                            delays.append(time.time() - told)
        writer.close()

    now = time.monotonic()
    await asyncio.gather(*(follow(n, 0, now + seconds / 2) for n in range(clients)))
    await asyncio.gather(*(follow(n, seen[n][-1] if seen[n] else 0, time.monotonic() + seconds / 2) for n in range(clients)))
    gaps = sum(list(range(1, len(numbers) + 1)) != numbers for numbers in seen)
    return delays, gaps, len(connected)


def _ended(store: Store, job_id: str, reached: Callable[[Job], bool] = lambda job: job.state.terminal) -> Job:
    deadline = time.monotonic() + WAIT_S
    while not reached(job := store.job(job_id)):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    assert job.error is None, job.error
    return job


def _pace(place: Place, database: str, workers: int, seconds: float, trials: int, *, broker: bool) -> float:
    """Seconds a trial, from the first evaluation that ended to the last, of one search by simulated worker processes."""
    environment = place.environment(database, broker=broker)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(database))
        stack.enter_context(running(place.folder / "coordinator.log", environment, "coordinator"))
        for _ in range(workers):
            stack.enter_context(script(place.folder / "worker.log", environment, "worker", "--seconds", str(seconds)))
        deadline = time.monotonic() + WAIT_S
        while sum(worker.alive for worker in store.workers()) < workers:
            assert time.monotonic() < deadline, "the workers did not come"
            time.sleep(0.1)
        spec = JobSpec.parse(JOB | {"budget": {"trials": trials}})
        job = store.job(submit(store, spec, place.settings(database)))
        _ended(store, job.id, lambda job: job.counts.succeeded >= 2 * workers)
        first, started = store.counts(job.id).succeeded, time.perf_counter()
        _ended(store, job.id, lambda job: job.counts.succeeded >= trials - 4)
        return (time.perf_counter() - started) / (store.counts(job.id).succeeded - first)


def path(place: Place) -> Iterator[Measure]:
    """Submission to the last result, with evaluations that compute nothing, by one worker process."""
    for kind, database, broker in (
        ("SQLite, no broker", place.sqlite, False),
        ("PostgreSQL, Celery", servers.new_database(place.postgres), True),
    ):
        pace = _pace(place, database, 1, 0.0, 150, broker=broker)
        yield at_least(f"whole path, no-op evaluator, {kind}", 1 / pace, "trials/s", 5.0, f"{1e3 * pace:.0f} ms a trial")


def sleeping(place: Place) -> Iterator[Measure]:
    """Evaluations of a second: what comes on top, and what a second worker adds, over PostgreSQL and Celery."""
    paces = {
        workers: _pace(place, servers.new_database(place.postgres), workers, 1.0, 70 + 20 * workers, broker=True) for workers in (1, 2)
    }
    yield at_most("overhead on evaluations of 1 s", 100 * (paces[1] - 1.0), "%", 10.0, f"{paces[1]:.3f} s a trial")
    yield at_least("two workers against one", paces[1] / paces[2], "times", 1.8, f"{paces[2]:.3f} s a trial")


def crowd(place: Place) -> Iterator[Measure]:
    """64 workers on evaluations of 5 s: threads of one process, each a machine of its own to the database."""
    database = servers.new_database(place.postgres)
    workers, seconds = 64, 5.0
    with Store.open(database) as store, simulated.Crowd(store, workers, seconds, lease_s=20.0) as crowd:
        spec = JobSpec.parse(JOB | {"budget": {"trials": 1300}})
        with running(place.folder / "coordinator.log", place.environment(database), "coordinator"):
            job = store.job(submit(store, spec, place.settings(database)))
            _ended(store, job.id, lambda job: job.counts.succeeded >= 3 * workers)
            begun = time.monotonic()
            time.sleep(12 * seconds)
            ended = time.monotonic()
            time.sleep(seconds + 1.0)  # what was under way then has ended
            store.cancel(job.id)
        busy = sum(max(0.0, min(end, ended) - max(begin, begun)) for begin, end in crowd.spans)
    yield at_least("64 workers, 5 s evaluations: busy", 100 * busy / (workers * (ended - begun)), "%", 95.0, f"{len(crowd.spans)} done")


def coordinator(place: Place) -> Iterator[Measure]:
    """A job of 10,000 trials is taken up again and asks on, with NSGA-II."""
    settings = place.settings()
    with Store.open(settings.database) as store, simulated.Crowd(store, 1):
        job = store.job(submit(store, JobSpec.parse(JOB | {"sampler": "nsga2", "budget": {"trials": 300}}), settings))
        stop = threading.Event()

        def driven() -> threading.Thread:
            thread = threading.Thread(target=_driven, args=(store, job.id, settings, stop))
            thread.start()
            return thread

        thread = driven()
        _ended(store, job.id, lambda job: bool(store.trials(job.id, limit=1, origin="searched")))
        store.pause(job.id)
        thread.join()
        _ended(store, job.id, lambda job: job.counts.open == 0)
        paused = store.job(job.id)
        simulated.fill(store, paused, problem_of(paused), 10_000)
        store.change_budget(job.id, {"trials": 10_100}, store.job(job.id).version)
        store.resume(job.id)
        started = time.perf_counter()
        thread = driven()
        _ended(store, job.id, lambda job: job.counts.trials > 10_000)
        rebuilt = time.perf_counter() - started
        _ended(store, job.id, lambda job: job.counts.trials > 10_010)
        begun = time.perf_counter()
        _ended(store, job.id, lambda job: job.counts.trials > 10_060)
        pace = (time.perf_counter() - begun) / 50
        store.cancel(job.id)
        thread.join()
    yield at_most("rebuild at 10,000 trials", rebuilt, "s", 15.0)
    yield at_most("NSGA-II at 10,000 trials: asked, stored, evaluated by nobody, told", 1e3 * pace, "ms a trial", 100.0)


def _driven(store: Store, job_id: str, settings: Settings, stop: threading.Event) -> None:
    from autoeff.search.crew import Stopped

    with contextlib.suppress(Stopped):
        drive(store, job_id, settings, threading.Event(), stop)


def million(place: Place) -> Iterator[Measure]:
    """As `large`, of a million trials: ten times what a server accepts."""
    yield from large(place, 1_000_000)


def large(place: Place, count: int = 100_000) -> Iterator[Measure]:
    """Page, front, summary and points of a job of 100,000 trials that goes on, over REST and SQLite."""
    settings = place.settings()
    with Store.open(settings.database) as store:
        job = store.job(submit(store, JobSpec.parse(JOB), settings, owner="ada"))
        windows = problem_of(job).windows
        started = time.perf_counter()
        simulated.fill_thinly(store, job, count, windows, seed=count)
        console.print(f"{count} trials written in {time.perf_counter() - started:.0f} s", style="dim")
        simulated.state_of(store, job.id, JobState.PAUSED)
        key = KeyRing(store.database).make("bench", "ada", ["jobs:read"])[1].text
        size = sum(path.stat().st_size for path in place.folder.glob("autoeff.db*"))
    headers = {"Authorization": f"Bearer {key}"}
    here, rng = f"/v1/jobs/{job.id}", random.Random(0)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(place.folder / "serve.log", place.environment(), "serve", "--port", "0", "--no-coordinator"))
        with httpx2.Client(base_url=said_url(server), headers=headers, timeout=300) as client:

            def timed(path: str) -> float:
                begun = time.perf_counter()
                client.get(path).raise_for_status()
                return time.perf_counter() - begun

            cursors = []
            cursor = ""
            for _ in range(20):  # cursors are signed, so pages are walked to
                page = client.get(f"{here}/trials?limit=500{cursor}").json()
                cursor = f"&cursor={page['next']}"
                cursors.append(cursor)
            first = {"front": timed(f"{here}/pareto"), "points": timed(f"{here}/points")}
            paths = {
                "page": lambda: f"{here}/trials?limit=50{rng.choice(cursors)}",
                "page of an origin": lambda: f"{here}/trials?limit=50&origin=searched",
                "page of a state that none has": lambda: f"{here}/trials?limit=50&state=failed",
                "front": lambda: f"{here}/pareto",
                "summary": lambda: here,
                "points": lambda: f"{here}/points",
            }
            for name, address in paths.items():
                seconds = [timed(address()) for _ in range(60)]
                limit = 50.0 if name in ("page", "front", "summary") else 200.0
                detail = f"p50 {1e3 * statistics.median(seconds):.1f} ms" + (f", first {first[name]:.2f} s" if name in first else "")
                yield at_most(f"{count:,} trials: {name}, p99", 1e3 * quantile(seconds, 0.99), "ms", limit, detail)
    console.print(f"{size / 2**20:.0f} MiB", style="dim")


PARTS: Mapping[str, Callable[[Place], Iterator[Measure]]] = {
    part.__name__: part for part in (submissions, claims, streams, path, sleeping, crowd, coordinator, large, million)
}


def main(
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.", metavar="NAME,NAME…")] = ",".join(PARTS),
    folder: Annotated[Path | None, typer.Option(help="For databases and logs; default a temporary one.")] = None,
    write: Annotated[bool, typer.Option(help="Keep the result.")] = True,
) -> None:
    unmet = 0
    for name in parts.split(","):
        load = os.getloadavg()[0]
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="autoeff-load-")))
            found = list(
                PARTS[name](Place(place, *(stack.enter_context(make()) for make in (servers.postgres_server, servers.redis_server))))
            )
        table = Table("measure", "target", "value", "unit", "", "seen besides", title=name)
        for row in found:
            verdict = "" if row.met is None else "met" if row.met else "NOT MET"
            table.add_row(row.name, row.target, f"{row.value:.4g}", row.unit, verdict, row.detail)
            unmet += row.met is False
        console.print(table)
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        stored[name] = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, load {load:.1f} before",
            "loaded": load > 0.5,
            "versions": {"python": platform.python_version()}
            | {
                package: importlib.metadata.version(package)
                for package in ("autoeff", "sqlalchemy", "fastapi", "celery", "optuna", "psycopg")
            },
            "measures": [asdict(row) for row in found],
        }
        if write:
            RESULTS.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    raise typer.Exit(1 if unmet else 0)


if __name__ == "__main__":
    typer.run(main)
