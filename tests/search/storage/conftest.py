"""A store in a real file, and short ways to fill it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autoeff.search.storage import Proposal, Store, process_identity
from autoeff.spaces.configuration import Configuration, Level, digest_of

LEASE_S = 600.0
RACE = """
import os, sys, traceback
reading, writing = os.pipe()
racers = []
for i in range(int(sys.argv[1])):
    racers.append(os.fork())
    if racers[-1] == 0:
        try:
            os.close(writing)
            os.read(reading, 1)  # until the starter lets go
            run(i)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
os.close(writing)
sys.exit(max(os.waitpid(racer, 0)[1] for racer in racers) != 0)
"""


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without jobs, migrated once for all tests."""
    file = tmp_path_factory.mktemp("empty") / "autoeff.db"
    Store.open(f"sqlite:///{file}").close()
    return file


@pytest.fixture(scope="session")
def empty_on_server(postgres: Any, servers: ModuleType) -> str:
    """The same on a PostgreSQL server."""
    url = str(servers.new_database(postgres))
    Store.open(url).close()
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without jobs, of each kind in turn."""
    if request.param == "sqlite":
        shutil.copyfile(request.getfixturevalue("empty"), tmp_path / "autoeff.db")
        yield f"sqlite:///{tmp_path / 'autoeff.db'}"
        return
    servers, postgres = request.getfixturevalue("servers"), request.getfixturevalue("postgres")
    made = servers.new_database(postgres, request.getfixturevalue("empty_on_server"))
    yield made
    servers.drop_database(postgres, made)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


@pytest.fixture
def race() -> Callable[[str, int], list[str]]:
    """Runs `run(i)` of some code in that many processes at the same moment; returns what they print."""

    def start(code: str, racers: int) -> list[str]:
        done = subprocess.run([sys.executable, "-c", f"{code}\n{RACE}", str(racers)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return start


@pytest.fixture
def me() -> str:
    return process_identity()


@pytest.fixture
def job(store: Store, me: str) -> tuple[str, int]:
    """Id and fence of a job that this process drives."""
    store.create_job("job", {"model": "demo"}, {"dense": 1}, {"decisions": []}, "0" * 64)
    return "job", store.acquire_coordinator("job", me, LEASE_S)


@pytest.fixture
def proposal() -> Callable[..., Proposal]:
    """A proposal whose work is named by `key`, by default its own number."""

    def make(number: int, key: object = None, **changes: Any) -> Proposal:
        levels: dict[str, Level] = {"a:bits": number % 7 + 2, "b:skip": "none"}
        values: dict[str, Any] = {
            "number": number,
            "configuration": Configuration(levels),
            "origin": "searched",
            "split": "search",
            "windows": 16,
            "cost": 1.0,
            "eval_key": digest_of(["work", number if key is None else key]),
            "costs": {"avg_bits": 3.25, "linear_bytes": 4096.0},
            "feasible": True,
        }
        return Proposal(**(values | changes))

    return make
