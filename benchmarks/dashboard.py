"""How fast the dashboard is with a job of many trials: `python benchmarks/dashboard.py [--trials 100000] [--write]`.

In a warm browser: from the click that opens the job to the drawn chart, turning a page of its trials, the processor time that both servers
spend on an opening, and what an idle page costs them: of a job that is paused, of one that runs but has no news, and of a finished one;
the list of jobs while one of them runs, and the hardware with three workers.
`--write` keeps the figures in `benchmarks/results/dashboard.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import servers
import simulated
from playwright.sync_api import Page, sync_playwright

from autoeff.dashboard.demo import unpack
from autoeff.search.job import JobSpec
from autoeff.search.keys import LOCAL
from autoeff.search.settings import Settings
from autoeff.search.standing import problem_of
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.records import JobState
from autoeff.search.storage.store import Store
from autoeff.search.submission import submit

ROUNDS = 5
IDLE_S = 20.0
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHART = "document.querySelector('.st-key-front .js-plotly-plot')"
OPENING, PAGING = "from the click to the drawn chart, s", "from the click to the next page of trials, s"
WORK = "processor time of both servers for an opening, s"
IDLE = "processor time of both servers while the page of {} is idle, % of a core"
BUSY = "processor time of both servers while a job has news every 2 s, % of a core"
IDLERS = {
    "a paused job": ("Job", JobState.PAUSED),
    "a running job": ("Job", JobState.RUNNING),
    "jobs of which one runs": ("Jobs", JobState.RUNNING),
    "the hardware": ("Hardware", JobState.RUNNING),
    "a finished job": ("Job", JobState.SUCCEEDED),
}
"""Pages that stand open, by name: the view, and the state of the job then."""
LIMITS = {OPENING: 2.0, PAGING: 0.5, WORK: 1.0} | {IDLE.format(name): 1.0 for name in IDLERS}
RESULTS = Path(__file__).parent / "results" / "dashboard.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    given = parser.parse_args()
    trials, load = given.trials, os.getloadavg()[0]
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
            with Store.open(Settings(home=home).database) as store:
                for number in range(3):
                    store.announce_worker(f"box/0-1.2/{number}/1.0", ["cpu"], "cpu", {"name": "x86_64", "cores": 2}, ttl_s=3600.0)
                for name, (view, state) in IDLERS.items():
                    simulated.state_of(store, job, state)
                    found[IDLE.format(name)] = idle(page, view, [api, pages])
                    if name == "a running job":
                        found[BUSY] = idle(page, view, [api, pages], lambda: simulated.state_of(store, job, JobState.RUNNING))
            browser.close()
    if given.write:
        facts = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, load {load:.1f} before",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("autoeff", "streamlit", "plotly")},
            "trials": trials,
            "measures": [
                {"name": k, "value": round(v, 3), "target": LIMITS.get(k), "met": v <= LIMITS.get(k, v)} for k, v in found.items()
            ],
        }
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{trials:,} trials, {psutil.cpu_count()} cores")
    for what, value in found.items():
        most = LIMITS.get(what)
        print(f"{what:92} {value:8.3f}" + ("" if most is None else f"   at most {most:g}   {'kept' if value <= most else 'MISSED'}"))


def filled(home: Path, trials: int) -> tuple[str, str]:
    """A home with the bundled search and a paused one of this many trials; the id of that one, and a key."""
    unpack(home)
    settings = Settings(home=home)
    with Store.open(settings.database) as store:
        spec = JobSpec.parse({"model": "demo", "knobs": {"bits": {}, "skip": {}}, "limits": ["avg_bits<=4"]})
        job = store.job(submit(store, spec, settings, owner=LOCAL))
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
    return {OPENING: statistics.median(openings), PAGING: statistics.median(turns[1:]), WORK: statistics.median(costs)}


def idle(page: Page, view: str, processes: list[psutil.Process], news: Callable[[], None] = lambda: None) -> float:
    """Per cent of a core while a view stands open and nothing happens, `news` every 2 s excepted."""
    links = page.get_by_test_id("stSidebarNav")
    for name in ("Compare", view):
        links.get_by_role("link", name=name, exact=True).click()
        page.wait_for_timeout(2000)
    before = spent(processes)
    for _ in range(int(IDLE_S / 2)):
        news()
        page.wait_for_timeout(2000)
    return 100 * (spent(processes) - before) / IDLE_S


def spent(processes: list[psutil.Process]) -> float:
    """Processor seconds of these and all that they started."""
    everyone = [one for process in processes for one in (process, *process.children(recursive=True))]
    return sum(sum(one.cpu_times()[:2]) for one in everyone if one.is_running())


if __name__ == "__main__":
    main()
