"""A server over a finished search of a tiny model, with keys of two owners."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import update

from autoeff.api.app import create_app
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.store import Store
from autoeff.search.storage.tables import JobRow

SMALL: dict[str, Any] = {"space": {"levels": {"*:bits": [16, 4, 2]}}, "budget": {"trials": 30}}
ALL = ("jobs:read", "jobs:write", "admin")


@dataclass
class Served:
    """A server and what is behind it.

    Attributes:
        client: Speaks to it without a key.
        keys: Key texts: `alice`, who owns the finished job and may do everything, `bob`, who may too and owns nothing, and `reader`,
            who may read what is alice's.
        job: Id of the finished job.
        tiny: A job body that a submission may send.
    """

    settings: Settings
    store: Store
    app: FastAPI
    client: TestClient
    keys: dict[str, str]
    job: str
    tiny: dict[str, Any]

    def ask(self, method: str, path: str, who: str | None = "alice", **options: Any) -> httpx2.Response:
        headers = dict(options.pop("headers", {}))
        if who is not None:
            headers["Authorization"] = f"Bearer {self.keys[who]}"
        for _ in range(20):
            answer: httpx2.Response = self.client.request(method, path, headers=headers, **options)
            if answer.status_code != 503 or not answer.json().get("type", "").endswith(":working"):
                break  # else this machine is slow, and asking again hears the end of it
        return answer

    def refused(self, answer: httpx2.Response, status: int, kind: str) -> dict[str, Any]:
        """The body of a problem, once it is seen to be one of this status and kind."""
        assert answer.headers["content-type"] == "application/problem+json", answer.text
        body: dict[str, Any] = answer.json()
        assert (answer.status_code, body["status"], body["type"]) == (status, status, f"urn:autoeff:problem:{kind}"), answer.text
        assert body["title"]
        assert body["detail"]
        assert body["trace_id"] == answer.headers["x-trace-id"]
        for folder in (self.settings.home.parent, *self.settings.data_roots):
            assert str(folder) not in answer.text
        return body


@pytest.fixture(scope="session")
def searched_home(tiny_models: dict[str, Path], once: Callable[[str, Callable[[Path], object]], Path]) -> tuple[Path, str]:
    """A folder with a text, a home with a finished search on it and its run directory, and the id of its job; only to read."""

    def search(root: Path) -> None:
        (root / "text.txt").write_text("the dog sat on the mat and the cat ate the hat while all the others went there again\n" * 60)
        text = {"source": str(root / "text.txt"), "windows": 4, "length": 16}
        job = {"model": str(tiny_models["llama"]), "data": text, "limits": ["linear_bytes<=0.35x"]}
        start(JobSpec.parse(job | SMALL), root / "run", Settings(home=root / "home", memory_cap_bytes=3 << 30))

    root = once("api", search)
    return root, json.loads((root / "run" / "run.json").read_text())["job"]


@pytest.fixture(scope="session")
def home(searched_home: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that home, for servers of this process."""
    return Path(shutil.copytree(searched_home[0] / "home", tmp_path_factory.mktemp("api") / "home"))


@pytest.fixture(scope="module")
def make_server(searched_home: tuple[Path, str], home: Path, tiny_models: dict[str, Path]) -> Iterator[Callable[..., Served]]:
    """`make_server(**settings)`: a server over that home."""
    root, job = searched_home
    running: list[tuple[TestClient, Store]] = []

    def make(**settings: Any) -> Served:
        given = {"calls_per_minute": 0, "model_roots": (tiny_models["llama"].parent,), "data_roots": (root,)} | settings
        machine = Settings(home=home, memory_cap_bytes=3 << 30, **given)
        store = Store.open(machine.database)
        with store.database.write() as connection:
            connection.execute(update(JobRow).where(JobRow.id == job).values(owner="alice"))
        ring = KeyRing(store.database)
        keys = {
            "alice": ring.make("all", "alice", ALL)[1].text,
            "bob": ring.make("all", "bob", ALL)[1].text,
            "reader": ring.make("reads", "alice", ["jobs:read"])[1].text,
        }
        app = create_app(machine, store)
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        running.append((client, store))
        tiny = {
            "model": "llama",
            "data": {"source": "text.txt", "windows": 4, "length": 16},
            "limits": ["linear_bytes<=0.35x"],
            **SMALL,
        }
        return Served(machine, store, app, client, keys, job, tiny)

    yield make
    for client, store in running:
        client.__exit__(None, None, None)
        store.close()


@pytest.fixture(scope="module")
def served(make_server: Callable[..., Served]) -> Served:
    return make_server()


@pytest.fixture(scope="module")
def live(served: Any) -> Iterator[str]:
    """The URL of a server that listens."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(served.app, lifespan="off", log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    bound.close()
