"""The resources: what they answer is what the command prints, pages fit together, states move as they may, requests may be repeated."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from autoeff.api.feed import Feed
from autoeff.client import Client
from autoeff.evaluators.latency_table import Entry, LatencyTable
from autoeff.search.facts import job_facts
from autoeff.search.results import rows_of
from autoeff.search.standing import standing_of
from autoeff.search.storage.records import JobState
from autoeff.spaces.space import SearchSpace


def submitted(served: Any, **changes: Any) -> str:
    answer = served.ask("POST", "/v1/jobs", json=served.tiny | changes)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job"])


def test_rows_are_those_that_the_command_prints(served: Any) -> None:
    """Also those of a page, which reads no other trials."""
    rows: list[dict[str, Any]] = []
    path: str | None = f"/v1/jobs/{served.job}/trials?limit=7"
    while path is not None:
        answer = served.ask("GET", path)
        rows += answer.json()["items"]
        cursor = answer.json()["next"]
        assert (cursor is not None) is ("link" in answer.headers)
        path = None if cursor is None else f"/v1/jobs/{served.job}/trials?limit=7&cursor={cursor}"
    expected = rows_of(served.store, served.job)
    assert any("kl_held_out" in row["measurements"] for row in rows if row["origin"] == "searched")
    assert rows == json.loads(json.dumps(expected))


def test_filters_hold_over_pages_and_cursors_are_of_one_listing(served: Any) -> None:
    every = served.ask("GET", f"/v1/jobs/{served.job}/trials?limit=500").json()["items"]
    page = served.ask("GET", f"/v1/jobs/{served.job}/trials?origin=table&state=succeeded&limit=3").json()
    assert page["items"] == [row for row in every if row["origin"] == "table"][:3]
    for other in ("origin=random", "origin=table"):
        assert (
            served.refused(served.ask("GET", f"/v1/jobs/{served.job}/trials?{other}&cursor={page['next']}"), 422, "invalid-input")["status"]
            == 422
        )
    for forged in ("0", page["next"][:-1], "null.abc", "\u00e4", "a" * 1001):
        assert (
            served.refused(served.ask("GET", f"/v1/jobs/{served.job}/trials", params={"cursor": forged}), 422, "invalid-input")["status"]
            == 422
        )


def test_a_job_is_known_by_its_etag(served: Any) -> None:
    path = f"/v1/jobs/{served.job}"
    for one in (path, f"{path}/pareto", f"{path}/trials/3", f"{path}/result", f"{path}/space"):
        answer = served.ask("GET", one)
        again = served.ask("GET", one, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert served.ask("GET", one, headers={"If-None-Match": '"0.0"'}).status_code == 200
    facts = job_facts(served.store.job(served.job))
    shown = served.ask("GET", path).json()
    assert {name: shown[name] for name in facts if name != "model"} == {name: value for name, value in facts.items() if name != "model"}
    assert shown["model"] == "llama"  # as it would be submitted, without the folder


def test_the_front_is_that_of_the_command(served: Any) -> None:
    standing = standing_of(served.store, served.store.job(served.job))
    front = served.ask("GET", f"/v1/jobs/{served.job}/pareto").json()
    assert [row["trial"] for row in front["items"]] == sorted(standing.front)
    assert (front["best"], front["best_quality"], front["feasible"]) == (standing.best, standing.best_quality, True)


def test_the_space_is_as_stored(served: Any) -> None:
    stored = served.store.job(served.job)
    space = SearchSpace.from_json(served.ask("GET", f"/v1/jobs/{served.job}/space").json())
    assert space == SearchSpace.from_json(stored.space)
    assert {decision.knob for decision in space.decisions} == {"bits"}


def test_points_are_those_of_the_trials(served: Any) -> None:
    rows = served.ask("GET", f"/v1/jobs/{served.job}/trials?limit=500").json()["items"]
    front = [row["trial"] for row in served.ask("GET", f"/v1/jobs/{served.job}/pareto").json()["items"]]
    path = f"/v1/jobs/{served.job}/points"
    found = served.ask("GET", path).json()
    assert (found["x"], found["y"], found["total"]) == ("linear_bytes", "kl", len(rows))
    assert [point["trial"] for point in found["items"] if point["front"]] == front
    values = {row["trial"]: {name: m["value"] for name, m in row["measurements"].items()} for row in rows}
    assert all((p["x"], p["y"]) == (values[p["trial"]]["linear_bytes"], values[p["trial"]].get("kl")) for p in found["items"])
    few = served.ask("GET", path, params={"x": "trial", "y": "kl_held_out", "max": 5}).json()
    assert len(few["items"]) <= 5
    assert all(point["x"] == point["trial"] for point in few["items"])
    for wrong in ({"x": "nothing"}, {"y": "a b"}, {"max": 0}, {"max": 5001}, {"maximum": 5}):
        assert served.refused(served.ask("GET", path, params=wrong), 422, "invalid-input")["status"] == 422


def test_a_trial_has_its_attempts(served: Any) -> None:
    trial = served.ask("GET", f"/v1/jobs/{served.job}/trials/0").json()
    assert [(attempt["kind"], attempt["outcome"]) for attempt in trial["attempts"]] == [("succeeded", "succeeded")]
    path = f"/v1/jobs/{served.job}/trials/0/attempts"
    found = served.ask("GET", path)
    assert found.json() == {"items": trial["attempts"]}
    assert served.ask("GET", path, headers={"If-None-Match": found.headers["etag"]}).status_code == 304
    assert served.refused(served.ask("GET", path.replace("/0/", "/9999/")), 404, "not-found")["status"] == 404
    assert served.refused(served.ask("GET", f"/v1/jobs/{served.job}/trials/9999"), 404, "not-found")["status"] == 404


def test_a_submission_that_is_repeated_is_one(served: Any) -> None:
    headers = {"Idempotency-Key": "first"}
    one, two = (served.ask("POST", "/v1/jobs", json=served.tiny, headers=headers) for _ in range(2))
    assert (one.status_code, two.status_code) == (202, 202)
    assert one.json() == two.json()
    assert one.headers["location"] == two.headers["location"] == f"/v1/jobs/{one.json()['job']}"
    assert "idempotent-replayed" not in one.headers
    assert two.headers["idempotent-replayed"] == "true"
    assert (
        served.refused(served.ask("POST", "/v1/jobs", json=served.tiny | {"seed": 1}, headers=headers), 422, "idempotency-key-reused")[
            "status"
        ]
        == 422
    )
    other = served.ask("POST", "/v1/jobs", who="bob", json=served.tiny, headers=headers)  # keys of others are others
    assert other.json()["job"] != one.json()["job"]


def test_another_job_under_a_key_that_is_under_way_is_refused(served: Any) -> None:
    served.app.state.context.backroom.start(time.sleep, 1)  # so that both wait
    bodies = [served.tiny, served.tiny | {"seed": 1}]
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda body: served.ask("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": "busy"}), bodies))
    taken, refused = sorted(answers, key=lambda answer: answer.status_code)
    assert taken.status_code == 202, taken.text
    assert served.refused(refused, 422, "idempotency-key-reused")["status"] == 422


def test_a_job_is_steered(served: Any) -> None:
    job = submitted(served)
    path = f"/v1/jobs/{job}"
    assert served.ask("GET", path).json()["state"] == "pending"
    assert [served.ask("POST", f"{path}/pause{mode}").json()["state"] for mode in ("", "?mode=now")] == ["paused", "paused"]
    assert served.ask("POST", f"{path}/resume").json()["state"] == "pending"
    seen = served.ask("GET", path)
    assert served.refused(served.ask("PATCH", path, json={"trials": 50}), 428, "precondition-required")["status"] == 428
    changed = served.ask("PATCH", path, json={"trials": 50}, headers={"If-Match": seen.headers["etag"]})
    assert (changed.status_code, changed.json()["budget"]) == (200, 50)
    assert (
        served.refused(
            served.ask("PATCH", path, json={"trials": 60}, headers={"If-Match": seen.headers["etag"]}), 412, "precondition-failed"
        )["status"]
        == 412
    )
    for wrong in ({}, {"trials": 0}, {"trials": None}, {"trials": 50, "x": 1}, {"seconds": -1}):
        assert served.refused(served.ask("PATCH", path, json=wrong, headers={"If-Match": "*"}), 422, "invalid-input")["status"] == 422
    assert served.ask("POST", f"{path}/retry-failed").json()["state"] == "pending"  # nothing has failed
    wrong = served.ask("POST", f"{path}/retry-failed?class=bad_luck")
    assert served.refused(wrong, 422, "invalid-input")["errors"][0]["parameter"] == "class.0"
    ended = [served.ask("POST", f"{path}/cancel").json()["state"] for _ in range(2)]
    assert ended == ["cancelled", "cancelled"]
    assert served.refused(served.ask("POST", f"{path}/resume"), 409, "conflict")["status"] == 409
    assert served.refused(served.ask("POST", f"{path}/retry-failed"), 409, "conflict")["status"] == 409
    assert served.refused(served.ask("GET", f"{path}/result"), 404, "not-found")["status"] == 404
    listed = served.ask("GET", "/v1/jobs?state=cancelled").json()["items"]
    assert job in [one["job"] for one in listed]


def test_bad_jobs_are_refused_as_the_command_refuses_them(served: Any) -> None:
    unreachable = served.refused(served.ask("POST", "/v1/jobs", json=served.tiny | {"limits": ["avg_bits<=0.1"]}), 422, "unreachable-limit")
    assert "least" in unreachable["detail"]
    assert served.refused(served.ask("POST", "/v1/jobs", json=served.tiny | {"sampler": "oracle"}), 422, "invalid-input")["status"] == 422
    small = served.refused(served.ask("POST", "/v1/jobs:validate", json=served.tiny | {"budget": {"trials": 3}}), 422, "invalid-input")
    assert "needs at least" in small["detail"]


def test_a_job_is_validated_without_being_started(served: Any) -> None:
    before = served.ask("GET", "/v1/jobs").json()["items"]
    found = served.ask("POST", "/v1/jobs:validate", json=served.tiny)
    assert found.status_code == 200
    assert found.json()["least"]["avg_bits"] < 4
    assert found.json()["job"]["budget"]["trials"] == 30
    assert str(served.settings.model_roots[0]) not in found.text
    assert served.ask("GET", "/v1/jobs").json()["items"] == before


def test_open_jobs_of_an_owner_are_counted(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [item["state"] for item in served.ask("GET", "/v1/jobs?limit=200").json()["items"]]
    monkeypatch.setattr(served.settings, "open_jobs", 2 + sum(not JobState(state).terminal for state in there))
    jobs = [submitted(served), submitted(served)]
    assert served.refused(served.ask("POST", "/v1/jobs", json=served.tiny), 429, "quota")["status"] == 429
    for job in jobs:
        served.ask("POST", f"/v1/jobs/{job}/cancel")


def test_a_new_budget_is_resolved(served: Any) -> None:
    path = f"/v1/jobs/{served.job}/resolve"
    measuring = {"limits": ["linear_bytes<=0.4x"], "measure": True}
    assert served.refused(served.ask("POST", path, who="reader", json=measuring), 403, "forbidden")["status"] == 403
    assert "begun without a server" in served.refused(served.ask("POST", path, json=measuring), 409, "conflict")["detail"]
    found = served.ask("POST", path, who="reader", json={"limits": ["linear_bytes<=0.4x"]}).json()
    assert (found["job"], found["limits"]) == (served.job, ["linear_bytes<=0.4x"])
    assert found[found["answer"]]["configuration"]
    assert served.refused(served.ask("POST", path, json={"limits": ["linear_bytes<=0.001x"]}), 422, "unreachable-limit")["status"] == 422
    assert served.refused(served.ask("POST", path, json={"limits": []}), 422, "invalid-input")["status"] == 422


def test_jobs_are_compared_by_whom_they_belong_to(served: Any) -> None:
    path = f"/v1/jobs:compare?job={served.job}"
    found = served.ask("GET", f"{path}&job={served.job}", who="reader").json()
    assert [run["job"] for run in found["runs"]] == [served.job, served.job]
    assert found["fronts"][0] == found["fronts"][1] != []
    assert all(budget["best"][0] == budget["best"][1] and budget["winner"] is None for budget in found["budgets"])
    assert served.refused(served.ask("GET", f"{path}&job={served.job}", who="bob"), 404, "not-found")["status"] == 404
    assert served.refused(served.ask("GET", path), 422, "invalid-input")["status"] == 422


def test_an_export_that_cannot_be_is_refused_at_once(served: Any) -> None:
    path = f"/v1/jobs/{served.job}/trials"
    assert served.refused(served.ask("POST", f"{path}/0/export", json={"format": "nothing"}), 422, "invalid-input")["status"] == 422
    held_out = next(trial.number for trial in served.store.trials(served.job, limit=500) if trial.split == "held_out")
    assert served.refused(served.ask("POST", f"{path}/{held_out}/export", json={}), 409, "conflict")["status"] == 409
    assert served.refused(served.ask("POST", f"{path}/9999/export", json={}), 404, "not-found")["status"] == 404


@pytest.mark.parametrize(
    "name", ["../autoeff.db", "..%2Fautoeff.db", "run.json", ".export-x", "trial-1.x.tar.json", "trial-1..tar", "secret"]
)
def test_no_other_file_is_given(served: Any, name: str) -> None:
    assert served.refused(served.ask("GET", f"/v1/jobs/{served.job}/artifacts/{name}"), 404, "not-found")["status"] == 404


def test_a_report_is_drawn_from_the_tables(served: Any) -> None:
    answer = served.ask("GET", f"/v1/jobs/{served.job}/artifacts/report.html")
    assert answer.status_code == 200
    assert b"<html" in answer.content[:500].lower()
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["content-disposition"].startswith("attachment")
    assert served.ask("GET", f"/v1/jobs/{served.job}/artifacts/front.png").content.startswith(b"\x89PNG")


def test_models_and_texts_are_those_under_the_roots(served: Any) -> None:
    models = {row["model"]: row for row in served.ask("GET", "/v1/models").json()["items"]}
    assert models["demo"]["bundled"]
    assert (models["llama"]["model_type"], models["llama"]["bundled"]) == ("llama", False)
    texts = [row["source"] for row in served.ask("GET", "/v1/datasets").json()["items"]]
    assert "text.txt" in texts
    assert "escape" not in texts


def test_a_folder_that_goes_takes_nothing_else_with_it(make_server: Callable[..., Any], tmp_path: Path) -> None:
    kept, gone = tmp_path / "kept", tmp_path / "gone"
    for folder in (kept, gone):
        folder.mkdir()
    (kept / "a.txt").write_text("a")
    served = make_server(data_roots=(gone, kept), model_roots=(gone,))
    gone.rmdir()
    assert [row["source"] for row in served.ask("GET", "/v1/datasets").json()["items"]] == ["a.txt"]
    assert all(row["bundled"] for row in served.ask("GET", "/v1/models").json()["items"])


def test_workers_are_shown(served: Any) -> None:
    served.store.announce_worker("host/boot.1/7/1.00", ["cpu"], "cpu", {"torch": "2"}, 60)
    (worker,) = served.ask("GET", "/v1/hardware").json()["items"]
    assert (worker["kind"], worker["queues"], worker["busy"]) == ("cpu", ["cpu"], False)


def test_measured_operations_are_those_of_the_tables(served: Any) -> None:
    folder = served.settings.home / "latency"
    folder.mkdir(exist_ok=True)
    entry = Entry(1200, 1100, 1300, 30)
    table = LatencyTable("CPU x", {"torch": "2"}, 1, "2026-11-01", {"linear k=8 m=1 n=4 float32": entry, "softmax n=4 float32": entry})
    table.write(folder / "cpu.json")
    (folder / "broken.json").write_text("{")
    (found,) = served.ask("GET", "/v1/kernel-latencies").json()["items"]
    assert (found["device"], found["total"]) == ("CPU x", 2)
    (found,) = served.ask("GET", "/v1/kernel-latencies?operation=linear").json()["items"]
    assert found["items"] == [{"operation": "linear k=8 m=1 n=4 float32", "median_ns": 1200, "low_ns": 1100, "high_ns": 1300, "rounds": 30}]


def test_keys_are_made_used_and_ended(served: Any) -> None:
    made = served.ask("POST", "/v1/keys", json={"name": "notebook", "owner": "alice", "scopes": ["jobs:read"], "expires_in_days": 1}).json()
    header = {"Authorization": f"Bearer {made['text']}"}
    assert served.client.get(f"/v1/jobs/{served.job}", headers=header).status_code == 200
    listed = served.ask("GET", "/v1/keys")
    assert made["text"] not in listed.text
    assert served.ask("DELETE", f"/v1/keys/{made['key']}").json()["revoked"]
    assert served.refused(served.client.get(f"/v1/jobs/{served.job}", headers=header), 401, "unauthorized")["status"] == 401
    assert served.refused(served.ask("DELETE", "/v1/keys/00000000"), 404, "not-found")["status"] == 404
    own = served.keys["alice"][3:11]
    assert served.refused(served.ask("DELETE", f"/v1/keys/{own}"), 409, "conflict")["status"] == 409
    for wrong in ({"scopes": []}, {"scopes": ["root"]}, {"owner": "a b"}, {"name": ""}, {"expires_in_days": 0}):
        body = {"name": "n", "owner": "alice", "scopes": ["admin"]} | wrong
        assert served.refused(served.ask("POST", "/v1/keys", json=body), 422, "invalid-input")["status"] == 422


def test_every_key_says_what_it_may(served: Any) -> None:
    for who, owner, scopes in (("bob", "bob", ["jobs:read", "jobs:write", "admin"]), ("reader", "alice", ["jobs:read"])):
        own = served.ask("GET", "/v1/keys/self", who=who).json()
        assert (own["owner"], sorted(own["scopes"])) == (owner, sorted(scopes))
        assert own["key"] == served.keys[who][3:11]
        assert "text" not in own


def test_events_are_replayed_from_where_the_client_was(served: Any) -> None:
    stored = served.store.events(served.job, limit=10_000)
    answer = served.ask("GET", f"/v1/jobs/{served.job}/events", headers={"Last-Event-ID": "5"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    sent = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.strip().split("\n\n")]
    assert [int(event["id"]) for event in sent[:-1]] == [event.seq for event in stored[5:]]
    assert [event["event"] for event in sent] == [*(event.kind for event in stored[5:]), "end"]
    assert json.loads(sent[-1]["data"]) == {"state": "succeeded"}
    for wrong in ("-1", "x", "1e3", str(2**60)):
        assert (
            served.refused(served.ask("GET", f"/v1/jobs/{served.job}/events", headers={"Last-Event-ID": wrong}), 422, "invalid-input")[
                "status"
            ]
            == 422
        )


def test_followers_miss_nothing_and_are_told_the_end(served: Any) -> None:
    """Three who come at different times, while events happen."""
    job = submitted(served)
    feed = Feed(served.store, every_s=0.01)

    async def follow(after: int) -> list[int]:
        return [told.seq async for batch in feed.follow(job, after) for told in batch]

    async def all_of_them() -> list[list[int]]:
        followers = [asyncio.create_task(follow(0)), asyncio.create_task(follow(1))]
        for turn in range(10):
            await asyncio.to_thread(served.store.pause if turn % 2 else served.store.resume, job)
            if turn == 5:
                followers.append(asyncio.create_task(follow(3)))
            await asyncio.sleep(0.01)
        await asyncio.to_thread(served.store.cancel, job)
        found = await asyncio.wait_for(asyncio.gather(*followers), 20)
        await feed.close()
        return found

    found = asyncio.run(all_of_them())
    last = served.store.job(job).events
    assert served.store.job(job).state is JobState.CANCELLED
    assert found == [list(range(1, last + 1)), list(range(2, last + 1)), list(range(4, last + 1))]


def test_a_stream_that_comes_later_takes_nothing_from_an_earlier_one(served: Any) -> None:
    """It reads what is new itself, before the earlier one has been handed it."""
    job = submitted(served)
    feed = Feed(served.store, every_s=0.2)

    async def both() -> list[int]:
        early = feed.follow(job, 0)
        seen = [told.seq for told in await anext(early)]
        waiting = asyncio.create_task(anext(early))
        await asyncio.sleep(0.1)  # the reader has looked and sleeps
        await asyncio.to_thread(served.store.pause, job)
        late = feed.follow(job, 0)
        assert [told.seq for told in await anext(late)] == [1, 2]
        further = asyncio.create_task(anext(late))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(served.store.cancel, job)
        seen += [told.seq for told in await asyncio.wait_for(waiting, 5)]
        seen += [told.seq async for batch in early for told in batch]
        await asyncio.wait_for(further, 5)
        await feed.close()
        return seen

    seen = asyncio.run(both())
    assert seen == list(range(1, served.store.job(job).events + 1))


def test_a_number_ahead_of_a_job_silences_no_other_stream(served: Any, live: str) -> None:
    job = submitted(served)

    def follow(after: int) -> list[str]:
        with Client(live, served.keys["alice"]) as client:
            return [event.kind for event in client.events(job, after)]

    with ThreadPoolExecutor() as threads:
        ahead = threads.submit(follow, 2**40)
        while not served.app.state.context.feed._last:
            time.sleep(0.01)
        other = threads.submit(follow, 0)
        served.ask("POST", f"/v1/jobs/{job}/cancel")
        kinds = [event.kind for event in served.store.events(job)]
        assert other.result(20) == [*kinds, "end"]
        assert ahead.result(20) == [*kinds[1:], "end"]


def test_a_key_follows_so_many_jobs_at_once(served: Any) -> None:
    feed = Feed(served.store, per_key=2)
    feed.enter("a")
    feed.enter("a")
    feed.enter("b")
    with pytest.raises(Exception, match="follows 2 jobs already"):
        feed.enter("a")
    feed.leave("a")
    feed.enter("a")
    assert feed.streams == 3
