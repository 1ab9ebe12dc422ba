"""A server as people start it, with a worker: a search over HTTP is followed to its end, and equals the one without a server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from autoeff.api.server import bound_socket, first_key, is_loopback, url_of
from autoeff.cli import main
from autoeff.client import Client
from autoeff.errors import InputError
from autoeff.search.settings import Settings
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.store import Store

READY_S = 60


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    url: str
    key: str


@pytest.fixture(scope="module")
def running(tiny_models: dict[str, Path], searched_home: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("server") / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOEFF_")}
    environment |= {"AUTOEFF_HOME": str(home), "AUTOEFF_MEMORY_CAP_BYTES": "3GiB", "AUTOEFF_POLL_S": "0.1"}
    command = [sys.executable, "-m", "autoeff.cli", "serve", "--with-worker", "--port", "0"]
    command += ["--models", str(tiny_models["llama"].parent), "--data", str(searched_home[0])]
    with (home.parent / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, cwd=home.parent)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(2)]
    told = dict(re.fullmatch(r"export (AUTOEFF_\w+)=(\S+)\n", line).groups() for line in said)  # type: ignore[union-attr]
    server = Running(process, told["AUTOEFF_SERVER"], told["AUTOEFF_KEY"])
    with Client(server.url, server.key) as client:
        client.models()  # asks again until the server answers
    yield server
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.timeout(420)
def test_a_search_over_http_is_the_search_without_a_server(
    running: Running,
    searched_home: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AUTOEFF_KEY", running.key)
    text = ["--data", "text.txt", "--windows", "4", "--length", "16"]
    words = ["search", "llama", *text, "--limit", "linear_bytes<=0.35x", "--levels", "*:bits=16,4,2", "--trials", "30"]
    assert main(["--server", running.url, *words, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"front   {tmp_path / 'run' / 'front.png'}" in out
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    job = json.loads((tmp_path / "run" / "run.json").read_text())["job"]
    with Client(running.url, running.key) as client, Store.open(Settings(home=searched_home[0] / "home").database) as store:
        there = list(client.trials(job))
        here = store.trials(searched_home[1], limit=500)
        assert [(t.digest, t.origin) for t in there] == [(t.configuration.digest, t.origin) for t in here]
        values = [trial.measurements["kl"].value for trial in there if "kl" in trial.measurements]
        assert values == [value for trial in here if (value := trial.value("kl")) is not None]
        front, result = client.pareto(job), client.result(job)
        embedded = store.job(searched_home[1]).result
        assert embedded is not None
        assert [row.trial for row in front.items] == sorted(embedded["front"])
        assert (result["found"], result["front"]) == (embedded["found"], embedded["front"])
        kinds = [event.kind for event in client.events(job)]
        assert kinds[0] == "job.created"
        assert kinds[-2:] == ["job.succeeded", "end"]
        assert kinds.count("trial.succeeded") == len(there)
        (worker,) = client.hardware().items
        assert worker.alive


def test_everything_beside_the_server_ends_with_it(running: Running) -> None:
    """However that ends; what it was doing is taken up by the next one."""
    beside = psutil.Process(running.process.pid).children(recursive=True)
    assert len(beside) >= 2
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()
    gone, alive = psutil.wait_procs(beside, timeout=60)
    assert not alive, [process.cmdline() for process in alive]
    assert len(gone) == len(beside)


def test_the_first_key_is_made_once_and_on_this_machine_alone(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/a.db") as store:
        ring = KeyRing(store.database)
        with pytest.raises(InputError, match="autoeff keys create"):
            first_key(ring, "0.0.0.0")
        text = first_key(ring, "127.0.0.1")
        assert text is not None
        assert ring.good(text[3:11]) is not None
        assert first_key(ring, "127.0.0.1") is None
        assert first_key(ring, "0.0.0.0") is None


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("host", False)],
)
def test_loopback_is_this_machine_alone(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_answers_are_sent_without_waiting_for_more() -> None:
    """asyncio switches Nagle's algorithm off only where a socket knows that it is one of TCP; else every answer is 40 ms late."""
    with bound_socket("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_an_address_that_cannot_be_is_said() -> None:
    assert (url_of("127.0.0.1", 1), url_of("::1", 1)) == ("http://127.0.0.1:1", "http://[::1]:1")
    with pytest.raises(InputError, match="cannot listen at"):
        bound_socket("256.1.1.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="choose another --port"):
        bound_socket("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("flag", ["--models", "--data"])
def test_a_folder_that_is_not_there_is_refused_at_the_start(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first key is made and shown."""
    monkeypatch.setenv("AUTOEFF_HOME", str(tmp_path / "home"))
    for name in ("AUTOEFF_MODEL_ROOTS", "AUTOEFF_DATA_ROOTS"):
        monkeypatch.setenv(name, "")
    assert main(["serve", "--port", "0", flag, str(tmp_path / "typo")]) == 2
    out, told = capsys.readouterr()
    assert (out, told.count("\n")) == ("", 1)
    assert f"there is no folder {tmp_path / 'typo'}; {flag}" in told


def test_keys_are_made_listed_and_ended_from_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOEFF_HOME", str(tmp_path))
    assert main(["keys", "create", "--name", "ci", "--owner", "team", "--scopes", "jobs:read", "--days", "7"]) == 0
    text = capsys.readouterr().out.strip()
    assert main(["keys", "ls", "--format", "json"]) == 0
    listed = capsys.readouterr().out
    assert text not in listed
    assert [row["key"] for row in json.loads(listed)] == [text[3:11]]
    assert main(["keys", "revoke", text[3:11]]) == 0
    capsys.readouterr()
    assert main(["keys", "revoke", "00000000"]) == 2
    assert main(["keys", "create", "--name", "x", "--owner", "a b"]) == 2
    with Store.open(Settings.read().database) as store:
        assert KeyRing(store.database).good(text[3:11]) is None
