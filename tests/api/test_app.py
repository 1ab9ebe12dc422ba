"""What holds for every route: keys, scopes, owners, problems, limits, and the contract that is checked in."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from autoeff.api.app import OPEN_ROUTES, create_app, openapi_document
from autoeff.api.bodies import BodyLimit
from autoeff.api.problems import ApiError
from autoeff.errors import StorageError
from autoeff.search.storage.keys import KeyRing

NOBODY = "0" * 12


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """(method, path) of everything that the application answers."""
    for context in iter_route_contexts(app.routes):
        for method in context.methods or ():
            yield method, str(context.path)


def filled(path: str, job: str) -> str:
    return path.format(job_id=job, number=0, name="report.html", prefix="0" * 8)


def test_every_route_but_two_needs_a_key(served: Any) -> None:
    walked = list(routes(served.app))
    assert len(walked) > 20
    for method, path in walked:
        answer = served.ask(method, filled(path, served.job), who=None)
        if path in OPEN_ROUTES:
            assert answer.status_code in (200, 503), path
        elif method != "HEAD":
            assert served.refused(answer, 401, "unauthorized")["status"] == 401
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "key",
    ["", "Basic YTpi", "Bearer ", "Bearer x", "Bearer ae_00000000_" + "a" * 43, "Bearer ae_0000\u00e4000_" + "a" * 43, "bearer"],
    ids=["empty", "basic", "no key", "no form", "unknown", "no ascii", "no space"],
)
def test_what_is_no_key_opens_nothing(served: Any, key: str) -> None:
    assert served.refused(served.client.get("/v1/jobs", headers={"Authorization": key.encode()}), 401, "unauthorized")["status"] == 401


def test_a_key_with_another_secret_opens_nothing(served: Any) -> None:
    text = served.keys["alice"]
    forged = text[:-1] + ("A" if text[-1] != "A" else "B")
    assert (
        served.refused(served.client.get("/v1/jobs", headers={"Authorization": f"Bearer {forged}"}), 401, "unauthorized")["status"] == 401
    )


def test_owners_never_meet(served: Any) -> None:
    """Whatever bob asks of alice's job is answered as for a job that does not exist."""
    bodies: dict[str, Any] = {"PATCH": {"trials": 50}, "POST": {"limits": ["linear_bytes<=0.3x"]}}
    asked = [(method, path) for method, path in routes(served.app) if "{job_id}" in path and method != "HEAD"]
    assert len(asked) > 10
    for method, path in asked:
        body = {"format": "recipe"} if path.endswith("export") else bodies.get(method)
        options = {"headers": {"If-Match": "*"}} | ({"json": body} if body is not None else {})
        answers = [served.ask(method, filled(path, job), who="bob", **options) for job in (served.job, NOBODY)]
        for answer in answers:
            assert served.refused(answer, 404, "not-found")["status"] == 404
        kept = [{key: value for key, value in answer.json().items() if key != "trace_id"} for answer in answers]
        assert kept[0] == kept[1], path
    his, hers = ({job["job"] for job in served.ask("GET", "/v1/jobs", who=who).json()["items"]} for who in ("bob", "alice"))
    assert served.job in hers - his
    assert not his & hers


def test_a_key_does_what_its_scopes_say(served: Any) -> None:
    assert served.ask("GET", f"/v1/jobs/{served.job}", who="reader").status_code == 200
    for method, path, body in [
        ("POST", "/v1/jobs", served.tiny),
        ("POST", f"/v1/jobs/{served.job}/cancel", None),
        ("POST", f"/v1/jobs/{served.job}/retry-failed", None),
        ("GET", "/v1/keys", None),
        ("GET", "/metrics", None),
    ]:
        assert served.refused(served.ask(method, path, who="reader", json=body), 403, "forbidden")["status"] == 403


def test_framework_errors_are_problems(served: Any) -> None:
    assert served.refused(served.ask("GET", "/nothing/here"), 404, "not-found")["status"] == 404
    wrong = served.ask("PUT", "/v1/jobs")
    assert served.refused(wrong, 405, "method-not-allowed")["status"] == 405
    assert set(wrong.headers["allow"].split(", ")) >= {"GET"}
    for method in ("PATCH", "DELETE"):
        assert served.ask(method, "/v1/keys/self").headers["allow"] == "GET"
    listed = served.refused(served.ask("GET", "/v1/jobs?limit=many"), 422, "invalid-input")
    assert listed["errors"][0]["parameter"] == "limit"
    assert served.refused(served.ask("GET", f"/v1/jobs/{served.job}/trials?origin=nobody"), 422, "invalid-input")["status"] == 422


def test_a_misspelt_filter_is_refused(served: Any) -> None:
    body = served.refused(served.ask("GET", f"/v1/jobs/{served.job}/trials?orign=table"), 422, "invalid-input")
    assert body["errors"] == [{"detail": "is unknown here", "parameter": "orign"}]
    assert served.ask("GET", f"/v1/jobs/{served.job}/trials?origin=table&state=succeeded&limit=1").status_code == 200


def test_a_fault_shows_nothing_of_itself(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("SELECT secret FROM /etc/passwd")

    monkeypatch.setattr(type(served.store), "jobs", fail)
    answer = served.ask("GET", "/v1/jobs")
    assert served.refused(answer, 500, "internal")["status"] == 500
    assert "secret" not in answer.text
    assert "passwd" not in answer.text


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"", 422, "invalid-input"),
        (b"{", 422, "invalid-input"),
        (b"[1]", 422, "invalid-input"),
        (b'{"model": "demo", "seed": NaN}', 422, "invalid-input"),
        (b'{"model": "demo", "seed": 1e999}', 422, "invalid-input"),
        (b'{"model": "demo", "seed": 18446744073709551616}', 422, "invalid-input"),
        (b'{"model": "demo", "seed": true}', 422, "invalid-input"),
        (b'{"model": "demo", "seed": "1"}', 422, "invalid-input"),
        (b'{"model": "de\\u0000mo"}', 422, "invalid-input"),
        (b'{"model": "\\ud800"}', 422, "invalid-input"),
        (b'{"model": "demo", "knobs": ' + b"[" * 40 + b"]" * 40 + b"}", 422, "invalid-input"),
        (b'{"knobs": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", 422, "invalid-input"),
        (b'{"model": "demo", "limits": [' + b'"a",' * 20_000 + b'"a"]}', 422, "invalid-input"),
        (b"\xff\xfe{", 422, "invalid-input"),
        (b'{"model": "' + b"x" * (1 << 20) + b'"}', 413, "too-large"),
        (b'{"model": "demo", "unknown": 1}', 422, "invalid-input"),
        (b'{"model": "demo", "budget": {"trials": 1000000}}', 422, "invalid-input"),
    ],
    ids=[
        *(
            "empty",
            "cut",
            "list",
            "nan",
            "infinite",
            "too long",
            "flag",
            "text",
            "nul",
            "surrogate",
            "deep",
            "very deep",
            "many",
            "no utf-8",
        ),
        *("large", "unknown", "budget"),
    ],
)
def test_a_bad_body_is_a_problem(served: Any, content: bytes, status: int, kind: str) -> None:
    assert (
        served.refused(
            served.ask("POST", "/v1/jobs:validate", content=content, headers={"Content-Type": "application/json"}), status, kind
        )["status"]
        == status
    )


def test_a_body_is_counted_while_it_comes(served: Any) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(40):
            yield b"x" * (1 << 16)

    answer = served.ask("POST", "/v1/jobs", content=parts(), headers={"Content-Type": "application/json"})
    assert served.refused(answer, 413, "too-large")["status"] == 413


@pytest.mark.parametrize("every_s", [60.0, 0.01], ids=["nothing", "a byte at a time"])
def test_a_body_that_does_not_come_is_not_waited_for_long(every_s: float) -> None:
    async def comes() -> Any:
        await asyncio.sleep(every_s)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def unsent(message: Any) -> None:
        raise AssertionError(message)

    with pytest.raises(ApiError, match=r"did not come within 0\.1 s") as raised:
        asyncio.run(BodyLimit(reads, limit=100, body_s=0.1)({"type": "http", "headers": []}, comes, unsent))
    assert raised.value.status == 408


def test_pointers_lead_to_what_is_wrong(served: Any) -> None:
    body = served.refused(
        served.ask("POST", "/v1/jobs", json={"model": "demo", "budget": {"trials": "many"}, "a/b": 1}), 422, "invalid-input"
    )
    assert {item["pointer"] for item in body["errors"]} == {"#/budget/trials", "#/a~1b"}


def test_another_content_type_is_refused(served: Any) -> None:
    answer = served.ask("POST", "/v1/jobs", content=b"model: demo", headers={"Content-Type": "application/yaml"})
    assert served.refused(answer, 415, "unsupported-media-type")["status"] == 415


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ""},
        {"model": "/etc"},
        {"model": "../home"},
        {"model": "llama/../../home"},
        {"model": "file:///etc/passwd"},
        {"model": "owner/name"},
        {"model": "x" * 5000},
        {"model": "~root"},
        {"data": {"source": "/etc/passwd"}},
        {"data": {"source": "home/autoeff.db/../../../etc/passwd"}},
        {"data": "package:pip"},
        {"data": "hub:owner/name"},
        {"eval_data": {"source": "escape"}},
        {"tune_data": {"source": "/etc/passwd"}},
        {"tasks": {"names": ["a"], "path": "/etc"}},
        {"tasks": {"names": ["../a"]}},
    ],
    ids=repr,
)
def test_nothing_outside_the_roots_is_reached(served: Any, changes: dict[str, Any]) -> None:
    link = served.settings.data_roots[0] / "escape"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    assert served.refused(served.ask("POST", "/v1/jobs", json=served.tiny | changes), 422, "invalid-input")["status"] == 422


def test_a_key_may_call_so_often_in_a_minute(make_server: Callable[..., Any]) -> None:
    served = make_server(calls_per_minute=5)
    answers = [served.ask("GET", "/v1/models") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert answers[0].headers["ratelimit"].startswith('"key";r=4;t=')
    assert served.refused(answers[5], 429, "too-many-requests")["status"] == 429
    assert int(answers[5].headers["retry-after"]) > 0
    assert served.ask("GET", "/v1/models", who="bob").status_code == 200


def test_guessing_keys_is_slowed_down(make_server: Callable[..., Any]) -> None:
    served = make_server(calls_per_minute=600)
    codes = [served.ask("GET", "/v1/jobs", who=None).status_code for _ in range(70)]
    assert codes[0] == 401
    assert codes[-1] == 429
    assert served.ask("GET", "/v1/jobs").status_code == 200  # of the same address, and no fault of its key


def test_a_key_reads_while_nothing_can_be_written(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("database or disk is full")

    monkeypatch.setattr(served.app.state.context.ring, "used", full)
    served.app.state.context.doorkeeper.forget()
    assert served.ask("GET", "/v1/jobs").status_code == 200


def test_the_contract_that_is_checked_in_is_current(root: Path) -> None:
    stored = json.loads((root / "api" / "openapi.json").read_text())
    assert stored == openapi_document(), "write it anew with `python -m autoeff.api`"
    assert stored["openapi"].startswith("3.1")


def test_the_contract_holds_what_the_routes_answer(served: Any) -> None:
    document = served.ask("GET", "/openapi.json").json()
    operations = [(path, method, found) for path, item in document["paths"].items() for method, found in item.items()]
    for path, _, operation in operations:
        guarded = path not in OPEN_ROUTES
        assert ("401" in operation["responses"]) is guarded, path
        assert bool(operation.get("security")) is guarded, path
        assert ("503" in operation["responses"]) is (path != "/livez"), path  # any other may meet a database that is away
        for status, response in operation["responses"].items():
            if status[0] in "45" and path != "/readyz":
                assert list(response["content"]) == ["application/problem+json"], (path, status)


def test_health_says_nothing_but_whether(served: Any) -> None:
    assert served.ask("GET", "/livez", who=None).text == "ok\n"
    assert served.ask("GET", "/readyz", who=None).json() == {"ready": True, "checks": {"database": "ok", "disk": "ok"}}


def test_a_broker_that_is_away_degrades_a_server_and_no_more(redis: Any, make_server: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url, state in ((redis.url, "ok"), (f"redis://127.0.0.1:{silent.getsockname()[1]}/0", "degraded")):
            answer = make_server(broker_url=url).ask("GET", "/readyz", who=None)
            assert (answer.status_code, answer.json()["ready"], answer.json()["checks"]["broker"]) == (200, True, state)


def test_metrics_count_requests_and_jobs(served: Any) -> None:
    served.ask("GET", f"/v1/jobs/{served.job}")
    text = served.ask("GET", "/metrics").text
    assert 'autoeff_jobs{state="succeeded"} 1.0' in text
    assert 'autoeff_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"}' in text
    assert served.job not in text


def test_invented_methods_are_one_label(served: Any) -> None:
    for number in range(3):
        served.ask(f"INVENT{number}", "/v1/jobs")
    text = served.ask("GET", "/metrics").text
    assert 'method="other"' in text
    assert "INVENT" not in text


def test_no_key_is_stored_or_logged(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    served.ask("GET", "/v1/jobs")
    served.ask("GET", "/v1/jobs/nothing")
    secret = served.keys["alice"].split("_", 2)[2]
    assert secret not in caplog.text
    for path in served.settings.home.glob("autoeff.db*"):
        assert secret.encode() not in path.read_bytes()
    assert KeyRing(served.store.database).good(served.keys["alice"][3:11]) is not None


def test_two_servers_of_a_home_read_each_other_s_cursors(served: Any) -> None:
    page = served.ask("GET", f"/v1/jobs/{served.job}/trials?limit=5").json()
    other = create_app(served.settings, served.store)
    read = other.state.context.cursors.read(f"trials {served.job} [] None", page["next"])
    assert read == 4
