"""The whole way in a browser: log in, submit, watch, choose, steer, export, download; pictures of every view in `runs/screenshots`."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, TimeoutError, expect, sync_playwright

from autoeff.client import Client
from autoeff.dashboard.demo import unpack
from autoeff.dashboard.theme import DARK, LIGHT
from autoeff.dashboard.words import short_model
from autoeff.evaluators.latency_table import Entry, LatencyTable
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.store import Store

WIDTHS = (1280, 1920)
SCHEMES = ("light", "dark")
TALL = 2400
"""Pixels: more than any page, so that none is cut and none has to be measured before its picture is taken."""
PATIENCE_MS = 120_000
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
HERE = re.compile(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:")
CHART = "document.querySelector('.st-key-front .js-plotly-plot')"
COUNT = f"() => ({CHART}?.data || []).reduce((n, trace) => n + trace.x.length, 0)"
RANGE = f"() => {CHART}._fullLayout.xaxis.range"
ZOOMED = f"() => {CHART}._fullLayout.xaxis.autorange === false"
# Nothing runs, nothing is left of the last run, everything has the colours that the reader's system asks for, and no size changes any more.
SETTLED = """inks => {
  const app = document.querySelector("[data-testid=stApp]");
  const ink = inks[matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"];
  const inPage = `rgb(${[1, 3, 5].map(i => parseInt(ink.slice(i, i + 2), 16)).join(", ")})`;
  const charts = [...document.querySelectorAll(".js-plotly-plot")].filter(chart => chart.offsetParent);
  const busy = app?.dataset.testScriptState !== "notRunning" || getComputedStyle(app).color !== inPage
    || document.querySelector("[data-stale=true], [data-testid=stSkeleton], [data-testid=stStatusWidget]")
    || charts.some(chart => chart._fullLayout?.font.color !== ink);
  const sized = [...document.querySelectorAll("canvas, .main-svg, [data-testid=stMainBlockContainer]")];
  const sizes = busy ? null : sized.map(one => `${one.clientWidth} ${one.clientHeight}`).join();
  const same = sizes !== null && sizes === window.sizesBefore;
  window.sizesBefore = sizes;
  return same;
}"""
WORD_JOINER = "\u2060"
STEP = 7
VIEWS = ("Jobs", "Submit", "Compare", "Job", "Configuration", "Budget", "Hardware", "Keys")


@dataclass
class Stage:
    """A server with a worker over a finished search, a stopped one and fifty of eve's with hostile names; its dashboard; a browser.

    Attributes:
        url: Of the dashboard.
        api: Of the server.
        home: Of the server.
        serve: Starts the server, with these flags; `away` ends it.
        keys: Texts by owner.
    """

    url: str
    api: str
    home: Path
    keys: dict[str, str]
    chromium: Browser
    serve: Callable[..., None]
    away: Callable[[], None]

    @contextmanager
    def page(self, who: str, failed: Path) -> Iterator[tuple[Page, list[str]]]:
        """A page for the bearer of this key, and what went wrong in it: faults of its scripts, dialogs, requests to anywhere else."""
        faults: list[str] = []
        with self.chromium.new_context(viewport={"width": WIDTHS[0], "height": TALL}, accept_downloads=True) as context:
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request: None if HERE.match(request.url) else faults.append(request.url))
            page.goto(self.url)
            expect(page.get_by_label("Key", exact=True)).to_be_visible()
            assert page.get_by_test_id("stSidebarNav").count() == 0  # without a key nothing is shown
            try:
                if who:
                    log_in(page, self.keys[who])
                yield page, faults
            except BaseException:
                page.screenshot(path=failed / "failed.png", full_page=True)
                raise


@pytest.fixture(scope="module")
def stage(
    servers: ModuleType, serving: Any, tmp_path_factory: Any, add_jobs: Any, copy_job: Any, hostile_names: list[str]
) -> Iterator[Stage]:
    home, port = tmp_path_factory.mktemp("stage"), servers.free_port()
    unpack(home)
    with Store.open(f"sqlite:///{home / 'autoeff.db'}") as store:
        ring, scopes = KeyRing(store.database), ["jobs:read", "jobs:write", "admin"]
        keys = {owner: ring.make("journey", owner, scopes)[1].text for owner in ("local", "eve")}
        (job,) = store.jobs(1)
    add_jobs(home / "autoeff.db", job.id, hostile_names)
    with closing(sqlite3.connect(home / "autoeff.db")) as base, base:  # something to compare with: a search that was stopped
        stopped = {"state": "cancelled", "result": None, "trials": 200, "succeeded": 200, "cost": 64.0}
        copy_job(base, job.id, "5707ed5707ed", first=200, spec={"limits": ["avg_bits<=4"], "seed": 1}, **stopped)
    (home / "latency").mkdir()
    latencies().write(home / "latency" / "cpu.json")
    with ExitStack() as running, sync_playwright() as playwright:

        def serve(*flags: str) -> str:
            url: str = running.enter_context(serving(home, *flags, "--port", str(port)))
            return url

        api = serve("--with-worker")
        with dashboard(servers, api) as url:
            chromium = playwright.chromium.launch(executable_path=servers.chromium(), args=FLAGS)
            yield Stage(url, api, home, keys, chromium, serve, running.close)
            chromium.close()


@pytest.fixture
def folder(root: Path) -> Path:
    """Where pictures are kept."""
    found = root / "runs" / "screenshots"
    found.mkdir(parents=True, exist_ok=True)
    return found


def latencies() -> LatencyTable:
    """Of a device that moves 10 GB and computes 50 GFLOP a second, and takes 2 µs for a call."""
    found = {}
    for k, n in ((128, 128), (128, 512), (512, 128), (1024, 1024), (4096, 1024)):
        for m in (1, 16, 256):
            for kind, bits in (("linear", 32), *((f"linear_wq bits={bits} group=64", bits) for bits in (2, 4, 8))):
                rest = "float32" if bits == 32 else "symmetric=0 float32"
                nanoseconds = round(2_000 + 0.1 * (k * n * bits / 8 + 4 * m * (k + n)) + 2 * k * m * n / 50)
                found[f"{kind} k={k} m={m} n={n} {rest}"] = Entry(nanoseconds, nanoseconds - 100, nanoseconds + 300, 30)
    return LatencyTable("a CPU as tests have it", {"torch": "2.13.0"}, 1, "2026-11-01", found)


@contextmanager
def dashboard(servers: ModuleType, url: str) -> Iterator[str]:
    """The URL of a dashboard of this server, as the command starts it."""
    port = servers.free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTOEFF_")}
    command = [sys.executable, "-m", "autoeff.cli", "dashboard", "--server", url, "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + PATIENCE_MS / 1000
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, process.stderr.read() if process.stderr else ""
                    assert time.monotonic() < until
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
    assert process.stdout is not None


def log_in(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_test_id("stSidebarNav")).to_be_visible()


def go(page: Page, view: str) -> None:
    link = page.get_by_test_id("stSidebarNav").get_by_role("link", name=view, exact=True)
    link.click()
    expect(link).to_have_attribute("aria-current", "page")
    settle(page)


def settle(page: Page) -> None:
    """Waits until the page is drawn and stays as it is; one that asks again by itself is quiet between."""
    page.wait_for_function(SETTLED, arg={"light": LIGHT.ink, "dark": DARK.ink}, polling=50)


def points(page: Page) -> int:
    """How many are drawn in the chart of the front."""
    return int(page.evaluate(COUNT))


def zoomed(page: Page) -> list[float]:
    """Drags over a part of that chart; the range of its axis then. A point that arrives meanwhile ends a drag."""
    for _ in range(10):
        box = page.locator(".st-key-front .nsewdrag").first.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
        page.mouse.up()
        with suppress(TimeoutError):
            page.wait_for_function(ZOOMED, timeout=2_000)
            return [float(end) for end in page.evaluate(RANGE)]
    raise AssertionError("the chart cannot be zoomed")


def choose(page: Page, label: str, option: str) -> None:
    """Opens a list and takes the option with these words; a page that is drawn again at that moment closes the list."""
    box = page.get_by_role("combobox", name=re.compile(f"^{label}"))
    for _ in range(10):
        settle(page)
        box.fill(option)
        with suppress(TimeoutError):
            page.get_by_role("option", name=re.compile(option)).first.click(timeout=5_000)
            return
    raise AssertionError(f"{label} offers no {option}")


def shoot(page: Page, folder: Path, name: str) -> None:
    """The page at every width, light and dark. What was dark before begins dark and ends light: each turn has the page drawn again."""
    dark = page.evaluate("() => matchMedia('(prefers-color-scheme: dark)').matches")
    for scheme, widths in zip(SCHEMES[:: -1 if dark else 1], (WIDTHS, WIDTHS[::-1]), strict=True):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for width in widths:
            page.set_viewport_size({"width": width, "height": TALL})
            settle(page)
            bottom = page.evaluate("() => document.querySelector('[data-testid=stMainBlockContainer]').getBoundingClientRect().bottom")
            assert bottom <= TALL
            shown = {"x": 0, "y": 0, "width": width, "height": max(900, bottom)}
            page.screenshot(path=folder / f"{name.lower()}-{width}-{scheme}.png", clip=shown)  # type: ignore[arg-type]


@pytest.mark.timeout(420)
def test_from_the_key_to_the_exported_model(stage: Stage, folder: Path) -> None:
    with stage.page("", folder) as (page, faults):
        shoot(page, folder, "login")
        log_in(page, stage.keys["local"])

        go(page, "Submit")
        # One knob of two levels and little text: a search of seconds.
        choose(page, "Knobs", "skip")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Remove bits").click()
        limits = page.get_by_role("combobox", name=re.compile("^Limits"))
        limits.fill("weight_bytes<=0.8x")
        limits.press("Enter")
        limits.press("Escape")
        for label, value in (("Budget: trials", "30"), ("Search text: windows", "1")):
            box = page.get_by_role("spinbutton", name=label)
            box.fill(value)
            box.press("Enter")
        command = page.get_by_test_id("stCode").first
        for flag in ("--knobs skip", "--limit", "--trials 30", "--windows 1"):
            expect(command).to_contain_text(flag)
        page.get_by_role("button", name="Check").click()
        expect(page.get_by_text("It can be run").first).to_be_visible()
        shoot(page, folder, "submit")
        page.get_by_role("button", name="Submit", exact=True).click()

        # Points arrive without the page being loaded again, and the reader's zoom stays.
        page.wait_for_url("**/job?job=*")
        page.evaluate("() => { window.sameJourney = true }")
        before = points(page)
        page.wait_for_function(f"() => ({COUNT})() > 0")
        zoom = zoomed(page)
        expect(page.get_by_test_id("stMain").get_by_text("succeeded").first).to_be_visible()
        page.wait_for_function(f"() => ({COUNT})() > {max(before - 1, 10)}")  # a quick machine may have had them all at first
        assert page.evaluate(RANGE) == pytest.approx(zoom)
        assert page.evaluate("() => window.sameJourney")
        job = re.search(r"job=([0-9a-f]{12})", page.url)
        assert job is not None

        # The best configuration, exported and downloaded.
        go(page, "Configuration")
        expect(page.get_by_text("What each layer saves").first).to_be_visible()
        page.get_by_role("button", name="Export", exact=True).click()
        written = page.get_by_role("button", name=re.compile(r"trial-\d+\.hf-dense\.tar"))
        expect(written).to_be_visible()
        settle(page)
        with page.expect_download() as download:
            written.click()
        with tarfile.open(download.value.path()) as archive:
            assert any(name.endswith("model.safetensors") for name in archive.getnames())
        with Client(stage.api, stage.keys["local"]) as client:
            assert client.job(job[1]).state == "succeeded"

        # From here on the search that was there, which has more to show.
        choose(page, "Job", "avg_bits<=3.5")
        page.wait_for_function("job => !location.href.includes(job)", arg=job[1])
        shoot(page, folder, "configuration")
        go(page, "Budget")
        metric = page.get_by_test_id("stMetric").first
        expect(metric).to_contain_text("expected kl")
        told = metric.inner_text()
        page.get_by_role("slider").first.focus()
        for _ in range(2):  # ten steps each; every stop is a budget to be answered
            page.keyboard.press("PageUp")
        expect(metric).not_to_have_text(re.compile(re.escape(told.split("\n")[-1])))
        shoot(page, folder, "budget")

        for view in ("Job", "Compare", "Hardware", "Keys", "Jobs"):
            go(page, view)
            if view == "Compare":
                for limit in ("avg_bits<=3.5", "avg_bits<=4"):
                    choose(page, "Jobs", limit)
                page.keyboard.press("Escape")
                expect(page.locator(".js-plotly-plot")).to_be_visible()
            shoot(page, folder, view)
        assert not faults


@pytest.mark.timeout(240)
def test_hostile_names_are_text_in_every_view(stage: Stage, folder: Path, hostile_names: list[str]) -> None:
    clean = "() => !window.pwned && !document.querySelector('[data-hostile]') && !document.querySelector('iframe')"
    with stage.page("eve", folder) as (page, faults):
        for view in VIEWS:
            go(page, view)
            assert page.evaluate(clean), view
        go(page, "Compare")
        page.get_by_role("combobox").click()
        expect(page.get_by_role("option").first).to_be_visible()
        assert page.evaluate(clean)
        page.keyboard.press("Escape")
        go(page, "Job")
        known = {re.sub(r"\s+", " ", short_model(name)).strip() for name in hostile_names}
        for number in range(0, len(hostile_names), STEP):  # down the list beside the page
            if number:
                here, box = page.url, page.get_by_test_id("stSidebar").get_by_role("combobox")
                box.press("ArrowDown")
                expect(page.get_by_role("option").first).to_be_visible()
                for key in ["ArrowDown"] * STEP + ["Enter"]:
                    box.press(key)
                page.wait_for_function("here => location.href !== here", arg=here)
                settle(page)
            shown = page.get_by_role("heading", level=1).inner_text().replace(WORD_JOINER, "")
            assert re.sub(r"\s+", " ", shown).strip() in known
            expect(page.get_by_test_id("stAlert").first).to_be_visible()  # the job's error, which is the name too
            assert page.evaluate(clean), shown
        assert not faults


@pytest.mark.timeout(240)
def test_what_goes_away_is_said_and_comes_back(stage: Stage, folder: Path) -> None:
    with stage.page("local", folder) as (page, faults), closing(sqlite3.connect(stage.home / "autoeff.db")) as base:
        alerts = page.get_by_test_id("stAlert")

        # A worker.
        go(page, "Hardware")
        workers, _, lost = (page.get_by_test_id("stMetric").nth(i) for i in range(3))
        expect(workers).to_contain_text("1")
        with Client(stage.api, stage.keys["local"]) as client:
            worker = next(worker for worker in client.hardware().items if worker.alive)
        os.kill(int(worker.worker.split("/")[2]), signal.SIGKILL)
        expect(lost).to_contain_text("1")

        # The server: what is known of a job stays, what must be asked for is missing; a page that only asks goes on without a click.
        go(page, "Job")
        expect(page.locator(".st-key-front")).to_be_visible()
        stage.away()
        go(page, "Budget")
        expect(alerts.first).to_contain_text("server cannot be reached")
        go(page, "Hardware")
        expect(alerts.filter(has_text="asks again by itself")).to_have_count(1)
        stage.serve("--no-coordinator")
        expect(workers).to_be_visible()
        expect(alerts.filter(has_text="No worker is alive")).to_be_visible()
        expect(alerts).to_have_count(1)

        # A key, and a job that runs.
        page.get_by_role("button", name="Log out").click()
        with Client(stage.api, stage.keys["local"]) as client:
            brief = client.make_key("brief", "eve", ["jobs:read"])
            log_in(page, brief.text)
            go(page, "Job")
            job = re.search(r"job=([0-9a-f]{12})", page.url)
            assert job is not None
            with base:
                base.execute("UPDATE job SET state = 'running', version = version + 1 WHERE id = ?", job.groups())
            go(page, "Job")
            expect(page.get_by_test_id("stMain").get_by_text("running").first).to_be_visible()
            with base:
                base.execute("DELETE FROM job WHERE id = ?", job.groups())
            expect(alerts.filter(has_text="not there any more")).to_be_visible()  # without a click
            page.get_by_role("button", name="Back to the jobs").click()
            expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
            go(page, "Hardware")
            client.revoke_key(brief.key)
        expect(alerts.filter(has_text="revoked")).to_be_visible()  # without a click
        log_in(page, stage.keys["eve"])
        assert not faults
