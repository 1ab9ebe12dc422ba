"""The verb `dashboard`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from autoeff.cli import main
from autoeff.commands_dashboard import link
from autoeff.dashboard.demo import FILE


def test_a_link_brings_a_token_and_never_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOEFF_KEY", "ae_secret")
    monkeypatch.delenv("AUTOEFF_DASHBOARD_TOKEN", raising=False)
    found = link("127.0.0.1", 8501)
    assert re.fullmatch(r"http://127\.0\.0\.1:8501/\?token=[\w-]{32}", found)
    assert link("127.0.0.1", 8501) == found
    assert link("::1", 1).startswith("http://[::1]:1/?token=")


def test_nobody_else_gets_a_link_that_lets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOEFF_KEY", "ae_secret")
    monkeypatch.setenv("AUTOEFF_DASHBOARD_TOKEN", "of another start")
    assert link("0.0.0.0", 8501) == "http://0.0.0.0:8501"
    assert "AUTOEFF_DASHBOARD_TOKEN" not in os.environ
    monkeypatch.delenv("AUTOEFF_KEY")
    assert link("127.0.0.1", 8501) == "http://127.0.0.1:8501"


def test_a_port_in_use_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["dashboard", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_the_demonstration_is_small() -> None:
    assert FILE.stat().st_size <= 300_000


@pytest.mark.slow
def test_the_demonstration_needs_nothing_else(tmp_path: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTOEFF_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "autoeff.cli", "dashboard", "--demo", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=", told)
        assert found is not None, told
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{found[1]}/_stcore/health", timeout=5) as answer:
                    assert answer.read() == b"ok"
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert process.stdout is not None
        assert process.stdout.read() == ""  # which a shell may read
