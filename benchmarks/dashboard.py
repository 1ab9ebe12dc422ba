"""How fast the dashboard is with a job of many trials: `python benchmarks/dashboard.py [--trials 100000]`.

In a warm browser: from the click that opens the job to the drawn chart, turning a page of its trials, the processor time that both servers
spend on an opening, and what an idle page costs them.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import servers
import simulated
from playwright.sync_api import Page, sync_playwright

from autoeff.dashboard.demo import unpack
from autoeff.search.job import JobSpec
from autoeff.search.keys import LOCAL
from autoeff.search.service import submit
from autoeff.search.settings import Settings
from autoeff.search.standing import problem_of
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.records import JobState
from autoeff.search.storage.store import Store

ROUNDS = 5
IDLE_S = 20.0
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHART = "document.querySelector('.st-key-front .js-plotly-plot')"
LIMITS = {
    "from the click to the drawn chart, s": 2.0,
    "from the click to the next page of trials, s": 0.5,
    "processor time of both servers for an opening, s": 1.0,
    "processor time of both servers while a page is idle, % of a core": 1.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100_000)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        job, key = filled(home, trials)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTOEFF_")} | {
            "AUTOEFF_HOME": name,
            "AUTOEFF_CALLS_PER_MINUTE": "0",
        }
        api_port, port = servers.free_port(), servers.free_port()
        url = f"http://127.0.0.1:{api_port}"
        with (
            command(environment, api_port, "/livez", "serve", "--no-coordinator", "--port", str(api_port)) as api,
            command(environment, port, "/_stcore/health", "dashboard", "--server", url, "--port", str(port)) as pages,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(executable_path=servers.chromium(), args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(120_000)
            found = measured(page, f"http://127.0.0.1:{port}", key, job, [api, pages])
            browser.close()
    print(f"{trials:,} trials, {psutil.cpu_count()} cores")
    for what, value in found.items():
        print(f"{what:70} {value:8.3f}   at most {LIMITS[what]:g}   {'kept' if value <= LIMITS[what] else 'MISSED'}")


def filled(home: Path, trials: int) -> tuple[str, str]:
    """A home with the bundled search and a paused one of this many trials; the id of that one, and a key."""
    unpack(home)
    settings = Settings(home=home)
    with Store.open(settings.database) as store:
        job = submit(
            store, JobSpec.parse({"model": "demo", "knobs": {"bits": {}, "skip": {}}, "limits": ["avg_bits<=4"]}), settings, owner=LOCAL
        )
        simulated.fill_thinly(store, job, trials, problem_of(job).windows, seed=0)
        simulated.state_of(store, job.id, JobState.PAUSED)
        return job.id, KeyRing(store.database).make("benchmark", LOCAL, ["jobs:read"])[1].text


@contextmanager
def command(environment: dict[str, str], port: int, health: str, *words: str) -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-m", "autoeff.cli", *words], env=environment, stdout=subprocess.DEVNULL) as process:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield psutil.Process(process.pid)
        process.terminate()


def measured(page: Page, url: str, key: str, job: str, processes: list[psutil.Process]) -> dict[str, float]:
    page.goto(url)
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Log in").click()
    links = page.get_by_test_id("stSidebarNav")
    openings, costs, turns = [], [], []
    for number in range(ROUNDS + 1):  # the first one warms the browser and the servers
        links.get_by_role("link", name="Hardware", exact=True).click()
        page.get_by_role("heading", name="Hardware").wait_for()
        page.wait_for_timeout(1000)
        before, begun = spent(processes), time.perf_counter()
        links.get_by_role("link", name="Job", exact=True).click()
        page.wait_for_function(f"() => ({CHART}?.data || []).reduce((n, trace) => n + trace.x.length, 0) > 1000")
        taken = time.perf_counter() - begun
        page.wait_for_timeout(1500)
        if number:
            openings.append(taken)
            costs.append(spent(processes) - before)
    assert job in page.url
    page.get_by_role("tab", name="Trials").click()
    following, shown = page.get_by_role("button", name="Next"), page.get_by_text(re.compile(r"^Trials \d+ to \d+ of"))
    shown.wait_for()
    for _ in range(ROUNDS + 1):
        told, begun = shown.inner_text(), time.perf_counter()
        following.click()
        page.wait_for_function("told => ![...document.querySelectorAll('p')].some(p => p.innerText === told)", arg=told)
        turns.append(time.perf_counter() - begun)
        page.wait_for_timeout(500)
    page.get_by_role("tab", name="Baselines").click()
    page.wait_for_timeout(3000)
    before = spent(processes)
    page.wait_for_timeout(1000 * IDLE_S)
    idle = 100 * (spent(processes) - before) / IDLE_S
    return dict(zip(LIMITS, (statistics.median(openings), statistics.median(turns[1:]), statistics.median(costs), idle), strict=True))


def spent(processes: list[psutil.Process]) -> float:
    """Processor seconds of these and all that they started."""
    everyone = [one for process in processes for one in (process, *process.children(recursive=True))]
    return sum(sum(one.cpu_times()[:2]) for one in everyone if one.is_running())


if __name__ == "__main__":
    main()
