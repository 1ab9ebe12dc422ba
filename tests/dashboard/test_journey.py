"""The whole way in a browser: log in, submit, watch, choose, steer, export, download; and pictures of every view.

The pictures are kept under `runs/screenshots`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from playwright.sync_api import Page, TimeoutError, expect, sync_playwright

from autoeff.client import Client
from autoeff.dashboard.demo import unpack
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
VIEWS = ("Jobs", "Submit", "Compare", "Job", "Configuration", "Budget", "Hardware", "Keys")


@contextmanager
def dashboard(servers: ModuleType, url: str) -> Iterator[str]:
    """The URL of a dashboard of this server, as the command starts it."""
    port = servers.free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTOEFF_")}
    command = [sys.executable, "-m", "autoeff.cli", "dashboard", "--server", url, "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 60
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


@contextmanager
def browser(servers: ModuleType, folder: Path) -> Iterator[tuple[Page, list[str]]]:
    """A page, and what went wrong in it: faults of its scripts, and requests to anywhere else."""
    faults: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=servers.chromium(), args=FLAGS)
        context = chromium.new_context(viewport={"width": WIDTHS[0], "height": 900}, accept_downloads=True)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if HERE.match(request.url) else faults.append(request.url))
        try:
            yield page, faults
        except BaseException:
            page.screenshot(path=folder / "failed.png", full_page=True)
            raise
        finally:
            chromium.close()


def log_in(page: Page, url: str, key: str) -> None:
    page.goto(url)
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


def shoot(page: Page, folder: Path, name: str, whole: bool) -> None:
    """The page at every width, light and dark; at the first alone where not the whole is wanted."""
    for scheme in SCHEMES if whole else SCHEMES[:1]:
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for width in WIDTHS if whole else WIDTHS[:1]:
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
def test_from_the_key_to_the_exported_model(servers: ModuleType, serving: Any, root: Path, tmp_path: Path, whole: bool) -> None:
    folder = root / "runs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    unpack(tmp_path)
    with Store.open(f"sqlite:///{tmp_path / 'autoeff.db'}") as store:
        key = KeyRing(store.database).make("journey", "local", ["jobs:read", "jobs:write", "admin"])[1].text
    with serving(tmp_path, "--with-worker") as api, dashboard(servers, api) as url, browser(servers, folder) as (page, faults):
        page.goto(url)
        expect(page.get_by_label("Key")).to_be_visible()
        assert page.get_by_test_id("stSidebarNav").count() == 0  # without a key nothing is shown
        shoot(page, folder, "login", whole)
        log_in(page, url, key)

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
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        expect(metric).not_to_have_text(re.compile(re.escape(told.split("\n")[-1])))

        with Client(api, key) as client:
            assert client.job(job[1]).state == "succeeded"
        for view in VIEWS:
            go(page, view)
            shoot(page, folder, view, whole)
        assert not faults
