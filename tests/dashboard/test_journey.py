"""The whole way in a browser: log in, submit, watch, choose, steer, export, download; and pictures of every view.

The slow form keeps pictures of every view under `runs/screenshots`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.store import Store

WIDTHS = (1280, 1920)
SCHEMES = ("light", "dark")
PATIENCE_MS = 120_000
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
HERE = re.compile(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:")
CHART = "document.querySelector('.st-key-front .js-plotly-plot')"
COUNT = f"() => ({CHART}?.data || []).reduce((n, trace) => n + trace.x.length, 0)"
RANGE = f"() => {CHART}._fullLayout.xaxis.range"
WORD_JOINER = "\u2060"
STEP = 7
VIEWS = ("Jobs", "Submit", "Compare", "Job", "Configuration", "Budget", "Hardware", "Keys")


@dataclass
class Stage:
    """A server with a worker over the finished search and fifty jobs of eve's with hostile names, its dashboard, and a browser.

    Attributes:
        url: Of the dashboard.
        api: Of the server.
        serve: Starts the server, with these flags; `away` ends it.
        keys: Texts by owner.
    """

    url: str
    api: str
    keys: dict[str, str]
    chromium: Browser
    serve: Callable[..., None]
    away: Callable[[], None]

    @contextmanager
    def page(self, who: str, failed: Path) -> Iterator[tuple[Page, list[str]]]:
        """A page for the bearer of this key, and what went wrong in it: faults of its scripts, dialogs, requests to anywhere else."""
        faults: list[str] = []
        with self.chromium.new_context(viewport={"width": WIDTHS[0], "height": 900}, accept_downloads=True) as context:
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request: None if HERE.match(request.url) else faults.append(request.url))
            page.goto(self.url)
            expect(page.get_by_label("Key")).to_be_visible()
            assert page.get_by_test_id("stSidebarNav").count() == 0  # without a key nothing is shown
            try:
                if who:
                    log_in(page, self.keys[who])
                yield page, faults
            except BaseException:
                page.screenshot(path=failed / "failed.png", full_page=True)
                raise


@pytest.fixture(scope="module")
def stage(servers: ModuleType, serving: Any, tmp_path_factory: Any, add_jobs: Any, hostile_names: list[str]) -> Iterator[Stage]:
    home, port = tmp_path_factory.mktemp("stage"), servers.free_port()
    unpack(home)
    with Store.open(f"sqlite:///{home / 'autoeff.db'}") as store:
        ring, scopes = KeyRing(store.database), ["jobs:read", "jobs:write", "admin"]
        keys = {owner: ring.make("journey", owner, scopes)[1].text for owner in ("local", "eve")}
        add_jobs(home / "autoeff.db", store.jobs(1)[0].id, hostile_names)
    with ExitStack() as running, sync_playwright() as playwright:

        def serve(*flags: str) -> str:
            url: str = running.enter_context(serving(home, *flags, "--port", str(port)))
            return url

        api = serve("--with-worker")
        with dashboard(servers, api) as url:
            chromium = playwright.chromium.launch(executable_path=servers.chromium(), args=FLAGS)
            yield Stage(url, api, keys, chromium, serve, running.close)
            chromium.close()


@pytest.fixture
def folder(root: Path) -> Path:
    """Where pictures are kept."""
    found = root / "runs" / "screenshots"
    found.mkdir(parents=True, exist_ok=True)
    return found


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
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_test_id("stSidebarNav")).to_be_visible()


def go(page: Page, view: str) -> None:
    page.get_by_test_id("stSidebarNav").get_by_role("link", name=view, exact=True).click()
    settle(page)


def settle(page: Page) -> None:
    """Waits until the page's script has run; a page that asks again by itself is quiet between."""
    page.wait_for_timeout(250)
    page.wait_for_function("() => !document.querySelector('[data-testid=stStatusWidget]')")


def points(page: Page) -> int:
    """How many are drawn in the chart of the front."""
    return int(page.evaluate(COUNT))


def zoomed(page: Page) -> list[float]:
    """Drags over a part of that chart; the range of its axis then."""
    box = page.locator(".st-key-front .nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)
    return [float(end) for end in page.evaluate(RANGE)]


def choose(page: Page, label: str, option: str) -> None:
    """Opens a list and takes the option that begins so; a page that is drawn again at that moment closes the list."""
    box = page.get_by_role("combobox", name=re.compile(f"^{label}"))
    for _ in range(10):
        settle(page)
        box.fill(option)
        try:
            page.get_by_role("option", name=re.compile(f"^{option}")).first.click(timeout=5_000)
        except TimeoutError:
            continue
        return
    raise AssertionError(f"{label} offers no {option}")


def shoot(page: Page, folder: Path, name: str) -> None:
    """The page at every width, light and dark."""
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.wait_for_timeout(1000)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(300)
            height = int(page.evaluate("() => document.querySelector('[data-testid=stMain]').scrollHeight"))
            page.set_viewport_size({"width": width, "height": max(900, min(height + 20, 3000))})
            settle(page)
            page.screenshot(path=folder / f"{name.lower()}-{width}-{scheme}.png")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})


@pytest.mark.timeout(420)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "all-pictures"])
def test_from_the_key_to_the_exported_model(stage: Stage, folder: Path, whole: bool) -> None:
    with stage.page("", folder) as (page, faults):
        if whole:
            shoot(page, folder, "login")
        log_in(page, stage.keys["local"])

        go(page, "Submit")
        # One knob of two levels and little text: a search of seconds.
        choose(page, "knobs", "skip")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Remove bits").click()
        limits = page.get_by_role("combobox", name=re.compile("^limits"))
        limits.fill("weight_bytes<=0.8x")
        limits.press("Enter")
        limits.press("Escape")
        for label, value in (("budget: trials", "30"), ("data: windows", "1")):
            box = page.get_by_role("spinbutton", name=label)
            box.fill(value)
            box.press("Enter")
        settle(page)
        expect(page.get_by_test_id("stCode").first).to_contain_text("--windows 1")
        page.get_by_role("button", name="Check").click()
        expect(page.get_by_text("It can be run")).to_be_visible()
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
        expect(page.get_by_text("What each layer saves")).to_be_visible()
        page.get_by_role("button", name="Export").click()
        written = page.get_by_role("button", name=re.compile(r"trial-\d+\.hf-dense\.tar"))
        expect(written).to_be_visible()
        settle(page)
        with page.expect_download() as download:
            written.click()
        with tarfile.open(download.value.path()) as archive:
            assert any(name.endswith("model.safetensors") for name in archive.getnames())

        # Another budget.
        go(page, "Budget")
        metric = page.get_by_test_id("stMetric").first
        expect(metric).to_contain_text("expected kl")
        told = metric.inner_text()
        slider = page.get_by_role("slider").first
        slider.focus()
        for _ in range(2):  # ten steps each; every stop is a budget to be answered
            page.keyboard.press("PageUp")
        expect(metric).not_to_have_text(re.compile(re.escape(told.split("\n")[-1])))

        with Client(stage.api, stage.keys["local"]) as client:
            assert client.job(job[1]).state == "succeeded"
        for view in VIEWS if whole else ("Compare", "Job", "Hardware", "Keys"):
            go(page, view)
            if view == "Job":
                choose(page, "Job", "demo · avg_bits")  # of the two searches the one that tells more
                for scheme, colours in (("dark", DARK), ("light", LIGHT)):  # charts follow the reader's theme
                    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                    page.wait_for_function(f"() => {CHART}?._fullLayout?.font.color === '{colours.ink}'")
            if whole:
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
                for key in ["ArrowDown"] * (1 + STEP) + ["Enter"]:
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
    with stage.page("local", folder) as (page, faults):
        go(page, "Hardware")
        workers, _, lost = (page.get_by_test_id("stMetric").nth(i) for i in range(3))
        expect(workers).to_contain_text("1")
        with Client(stage.api, stage.keys["local"]) as client:
            (worker,) = client.hardware().items
        os.kill(int(worker.worker.split("/")[2]), signal.SIGKILL)
        expect(lost).to_contain_text("1")
        go(page, "Job")
        expect(page.locator(".st-key-front")).to_be_visible()
        stage.away()
        go(page, "Budget")  # what is known of the job stays, what must be asked for is missing
        expect(page.get_by_test_id("stAlert").first).to_contain_text("server cannot be reached")
        go(page, "Hardware")
        alerts = page.get_by_test_id("stAlert")
        expect(alerts.filter(has_text="asks again by itself")).to_have_count(1)
        stage.serve("--no-coordinator")
        expect(workers).to_be_visible()  # without a click
        expect(alerts.filter(has_text="No worker is alive")).to_be_visible()
        expect(alerts).to_have_count(1)
        assert not faults
