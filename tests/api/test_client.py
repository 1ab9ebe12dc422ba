"""The typed client, against a server that listens: the same data as the database has, errors as errors, patience where it helps."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from autoeff import client as client_module
from autoeff.cli import main
from autoeff.client import Client
from autoeff.errors import AutoeffError, Conflict, Forbidden, InputError, NotFound, Stale, Unavailable, UnreachableLimit

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def client(served: Any, live: str) -> Iterator[Client]:
    with Client(live, served.keys["alice"]) as opened:
        yield opened


@pytest.fixture
def command(served: Any, live: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a verb here and, with `there=True`, on the server."""
    monkeypatch.setenv("AUTOEFF_HOME", str(served.settings.home))
    monkeypatch.setenv("AUTOEFF_KEY", served.keys["alice"])
    monkeypatch.setenv("AUTOEFF_MEMORY_CAP_BYTES", "3GiB")

    def run(*arguments: str, there: bool = False) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*(["--server", live] if there else []), *arguments])
        return code, *capsys.readouterr()

    return run


def answering(*answers: httpx2.Response | Exception, **options: Any) -> tuple[Client, list[httpx2.Request]]:
    """A client of a server that gives these answers in turn, and what it was asked."""
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        found = answers[len(asked) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    return Client("http://server", "ae_key", transport=httpx2.MockTransport(answer), **options), asked


def busy(status: int, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"type": "urn:autoeff:problem:unavailable", "detail": "busy"}, headers=headers)


ACCEPTED = httpx2.Response(202, json={"job": "0" * 12, "links": {}})


def test_verbs_print_the_same_here_and_there(served: Any, command: Command) -> None:
    """The model's name aside, which the server shows as it may be submitted."""
    for words in (
        ["status", served.job],
        ["ls", served.job],
        ["pareto", served.job],
        ["best", served.job],
        ["show", served.job, "3"],
        ["resolve", served.job, "--limit", "linear_bytes<=0.4x"],
        ["compare", served.job, served.job],
    ):
        for form in ("table", "json"):
            here, there = (command(*words, "--format", form, there=there) for there in (False, True))
            full = str(served.settings.model_roots[0]) + "/"
            assert there == tuple(part.replace(full, "") if isinstance(part, str) else part for part in here), words


def test_verbs_refuse_the_same_here_and_there(served: Any, command: Command) -> None:
    for words in (["show", served.job, "9999"], ["show", served.job, "x"], ["resolve", served.job, "--limit", "linear_bytes<=0.0001x"]):
        here, there = (command(*words, there=there) for there in (False, True))
        assert here == there, words
        assert here[0] == 2
    code, _, told = command("status", "0" * 12, there=True)
    assert (code, told) == (2, "autoeff: error: there is no job of this id\n")


def test_ls_lists_the_jobs_of_the_key(served: Any, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for who, owns in (("alice", True), ("bob", False)):
        monkeypatch.setenv("AUTOEFF_KEY", served.keys[who])
        code, out, _ = command("ls", "--format", "json", there=True)
        assert code == 0
        assert (served.job in [row["job"] for row in json.loads(out)]) == owns


def test_a_dry_run_is_the_server_s(served: Any, command: Command) -> None:
    words = ["search", "llama", "--data", "text.txt", "--windows", "4", "--length", "16", "--trials", "40", "--dry-run"]
    code, out, _ = command(*words, there=True)
    assert code == 0
    assert "least --trials" in out
    code, out, told = command(*words, "--limit", "avg_bits<=0.1", there=True)
    assert (code, out) == (2, "")
    assert "least" in told


def test_without_a_key_the_verb_says_what_is_missing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOEFF_KEY")
    code, _, told = command("ls", there=True)
    assert code == 2
    assert "AUTOEFF_KEY" in told


def test_a_run_of_a_server_says_so(served: Any, live: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "job": served.job, "server": live}))
    assert command("status", str(tmp_path), there=True)[0] == 0
    code, _, told = command("status", str(tmp_path))
    assert code == 2
    assert f"--server {live}" in told


def test_pages_are_those_of_the_whole(served: Any, client: Client) -> None:
    whole = list(client.trials(served.job))
    first = client.trial_page(served.job, limit=7)
    second = client.trial_page(served.job, limit=7, cursor=first.next)
    assert [*first.items, *second.items] == whole[:14]
    assert [row.trial for row in client.trial_page(served.job, ["succeeded"], "table", limit=3).items] == [
        row.trial for row in client.trials(served.job, ["succeeded"], "table")
    ][:3]
    page = client.job_page(["succeeded"], limit=1)
    assert ([job.job for job in page.items], page.next is None) == ([served.job], False)
    assert client.job_page(["succeeded"], limit=1, cursor=page.next).items == []


def test_points_have_the_axes_that_are_asked_for(served: Any, client: Client) -> None:
    points = client.points(served.job, "trial", "weight_bytes", most=7)
    assert (points.x, points.y, len(points.items) <= 7) == ("trial", "weight_bytes", True)
    assert client.points(served.job).x == "linear_bytes"


def test_the_client_knows_its_key_its_contract_and_a_space(served: Any, client: Client) -> None:
    assert client.own_key().key == served.keys["alice"][3:11]
    assert "JobSpec" in client.contract()["components"]["schemas"]
    assert client.space(served.job)["decisions"]
    assert client.kernel_latencies("linear", limit=1).items is not None


def test_an_answer_of_another_version_is_said_to_be_one() -> None:
    client, _ = answering(httpx2.Response(200, json={"job": 1}))
    with pytest.raises(AutoeffError, match="another version"):
        client.job("0" * 12)


def test_patience_can_be_short() -> None:
    client, asked = answering(busy(503), busy(503), busy(503), attempts=2)
    with pytest.raises(Unavailable, match="busy"):
        client.job("0" * 12)
    assert len(asked) == 2


def test_events_end_and_the_export_is_unpacked(served: Any, client: Client, command: Command, tmp_path: Path) -> None:
    events = list(client.events(served.job, after=3))
    assert [event.seq for event in events[:-1]] == [event.seq for event in served.store.events(served.job, 3, 10_000)]
    assert (events[-1].kind, events[-1].body) == ("end", {"state": "succeeded"})
    best = client.pareto(served.job).best
    assert best is not None
    artifact = client.export(served.job, best, tmp_path / "out", "recipe")
    assert artifact.facts is not None
    assert artifact.facts["trial"] == pytest.approx(artifact.facts["measured"], rel=1e-4)
    again = served.ask("POST", f"/v1/jobs/{served.job}/trials/{best}/export", json={"format": "recipe"})
    assert (again.status_code, again.json()["state"], again.headers["location"]) == (202, "ready", artifact.href)
    whole = served.ask("GET", artifact.href)
    assert whole.headers["content-disposition"].startswith("attachment")
    assert hashlib.sha256(whole.content).hexdigest() == artifact.sha256
    served.refused(served.ask("GET", artifact.href, who="bob"), 404, "not-found")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == artifact.facts["files"]
    with pytest.raises(InputError, match="exists already"):
        client.export(served.job, best, tmp_path / "out", "recipe")
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
    code, told, _ = command("export", served.job, "best", str(tmp_path / "again"), "--format", "recipe", there=True)
    assert code == 0
    assert re.search(r"kl after reload +[\d.e-]+\n", told)
    assert {path.name for path in (tmp_path / "again").iterdir()} == set(artifact.facts["files"])


def test_an_export_that_the_server_lost_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    building = {"name": "trial-1.recipe.tar", "state": "building", "media_type": "application/x-tar", "href": "/there"}
    client, _ = answering(httpx2.Response(202, json=building), httpx2.Response(200, json={"items": []}))
    with pytest.raises(AutoeffError, match="the server lost trial-1.recipe.tar"):
        client.export("0" * 12, 1, tmp_path / "out", "recipe")


def test_problems_are_errors(served: Any, live: str, client: Client) -> None:
    with pytest.raises(NotFound):
        client.job("0" * 12)
    with pytest.raises(NotFound):
        client.job("../keys")
    with pytest.raises(UnreachableLimit):
        client.submit(served.tiny | {"limits": ["avg_bits<=0.1"]})
    with Client(live, served.keys["reader"]) as reader, pytest.raises(Forbidden, match="scope jobs:write"):
        reader.cancel(served.job)
    with Client(live, "ae_no_key") as nobody, pytest.raises(Forbidden, match="unknown, expired or revoked"):
        nobody.job(served.job)
    job = client.job(client.submit(served.tiny).job)
    assert client.change_budget(job, trials=45).budget == 45
    with pytest.raises(Stale):
        client.change_budget(job, trials=50)
    assert client.retry_failed(job.job, ["crash"]).state == "pending"
    assert client.attempts(served.job, 0)[0].kind == "succeeded"
    client.cancel(job.job)
    with pytest.raises(Conflict):
        client.resume(job.job)


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    client, asked = answering(busy(503), httpx2.ConnectError("refused"), busy(429, **{"Retry-After": "7"}), ACCEPTED)
    assert client.submit({"model": "demo"}).job == "0" * 12
    assert len({request.headers["idempotency-key"] for request in asked}) == 1
    assert len(asked) == 4
    assert waited[2] == 7


def test_patience_ends_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    client, asked = answering(*[httpx2.ConnectError("refused")] * 20)
    with pytest.raises(Unavailable, match="http://server"):
        client.models()
    assert len(asked) == client_module._ATTEMPTS
    client, asked = answering(busy(429, **{"Retry-After": "3600"}))
    with pytest.raises(Unavailable, match="busy"):
        client.models()


def test_what_may_happen_once_is_asked_once() -> None:
    client, asked = answering(busy(503))
    with pytest.raises(Unavailable):
        client.make_key("n", "o", ["admin"])
    assert len(asked) == 1


def test_a_stream_that_breaks_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def stream(text: str) -> httpx2.Response:
        return httpx2.Response(200, text=text, headers={"Content-Type": "text/event-stream"})

    first = stream('event: job.created\ndata: {}\nid: 1\n\nevent: job.running\ndata: {"a": 1}\nid: 2\n\n')
    last = stream('event: job.failed\ndata: {}\nid: 3\n\nevent: end\ndata: {"state": "failed"}\n\n')
    client, asked = answering(first, httpx2.ReadError("gone"), last)
    assert [(event.seq, event.kind) for event in client.events("0" * 12)] == [
        (1, "job.created"),
        (2, "job.running"),
        (3, "job.failed"),
        (None, "end"),
    ]
    assert [request.headers["last-event-id"] for request in asked] == ["0", "2", "2"]


@pytest.mark.parametrize("server", ["", "server", "ftp://server", "http://", None])
def test_what_is_no_server_is_refused(server: Any) -> None:
    with pytest.raises(InputError, match="write for example"):
        Client(server, "ae_key")


def test_a_damaged_download_leaves_nothing(served: Any, client: Client, tmp_path: Path) -> None:
    (artifact, *_) = client.artifacts(served.job)
    with pytest.raises(Exception, match="damaged"):
        client.download(artifact.model_copy(update={"sha256": "0" * 64}), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
