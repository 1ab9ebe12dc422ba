"""A cluster on one machine: throw-away Redis and PostgreSQL, the API with a coordinator, two Celery workers, one search over REST.

    python benchmarks/demo_cluster.py

Everything is gone afterwards. Prints what was found, how many evaluations each worker did, and where the seconds went.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import servers

import autoeff
from autoeff.errors import Unavailable

JOB = {
    "model": "demo",
    "knobs": ["bits", "skip"],
    "data": {"windows": 4, "length": 128},
    "eval_data": {"windows": 4, "length": 128},
    "limits": ["avg_bits<=3.5"],
    "budget": {"trials": 90},
}
READY_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        redis, postgres = stack.enter_context(servers.redis_server()), stack.enter_context(servers.postgres_server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autoeff-cluster-")))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOEFF_")}
        environment |= {"AUTOEFF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "AUTOEFF_POLL_S": "0.2"}
        environment |= {"AUTOEFF_DATABASE_URL": servers.new_database(postgres), "AUTOEFF_BROKER_URL": redis.url}
        print(f"redis       {redis.url}\npostgresql  {environment['AUTOEFF_DATABASE_URL']}")
        server = stack.enter_context(running(folder / "serve.log", environment, "serve", "--port", "0"))
        url, key = said(server)
        print(f"api         {url}")
        for number in range(arguments.workers):
            stack.enter_context(running(folder / f"worker-{number}.log", environment, "worker", "--queues", "cpu"))
        client = stack.enter_context(autoeff.Client(url, key))
        wait_for_workers(client, arguments.workers)
        started = time.monotonic()
        job = client.submit(JOB).job
        print(f"job         {job}, followed by its events")
        evaluations: Counter[str] = Counter()
        for event in client.events(job):
            if event.kind == "trial.running":
                evaluations[event.body["worker"]] += 1
            elif event.kind in ("job.running", "job.phase", "job.failed", "end"):
                print(f"{time.monotonic() - started:8.1f} s  {event.kind} {dict(event.body)}")
        front = client.pareto(job)
        print(f"\n{len(front.items)} on the front; best trial {front.best}, {front.quality} {front.best_quality:.4g}\n")
        print("worker                                    evaluations")
        for worker in client.hardware().items:
            print(f"{'process ' + worker.worker.split('/')[2]:40}  {evaluations[worker.worker]:11}")
        succeeded = client.job(job).state == "succeeded"
    busy = len(evaluations) == arguments.workers and min(evaluations.values(), default=0) > 0
    print("\nall stopped" if succeeded and busy else "\nnot every worker evaluated, or the search failed")
    return 0 if succeeded and busy else 1


@contextlib.contextmanager
def running(log: Path, environment: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `autoeff`, asked to end like a service manager would."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "autoeff.cli", *arguments]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if process.returncode not in (0, -signal.SIGTERM):
            sys.stderr.write(f"{' '.join(arguments)} ended with {process.returncode}:\n{log.read_text()[-2000:]}\n")


def said(server: subprocess.Popen[str]) -> tuple[str, str]:
    """URL and first key, as `autoeff serve` prints them."""
    assert server.stdout is not None
    told: dict[str, str] = {}
    for line in server.stdout:
        if match := re.fullmatch(r"export (AUTOEFF_\w+)=(\S+)\n", line):
            told[match[1]] = match[2]
        if "AUTOEFF_SERVER" in told:
            return told["AUTOEFF_SERVER"], told["AUTOEFF_KEY"]
    raise RuntimeError("autoeff serve ended before it served")


def wait_for_workers(client: autoeff.Client, number: int) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(Unavailable):
            if sum(worker.alive for worker in client.hardware().items) >= number:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{number} workers did not announce themselves within {READY_S:g} s")


if __name__ == "__main__":
    sys.exit(main())
