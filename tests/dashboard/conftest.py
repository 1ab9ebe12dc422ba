"""A server over the search that comes with the package, and views drawn against it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from streamlit import config
from streamlit.testing.v1 import AppTest

from autoeff.client import Client
from autoeff.dashboard.demo import unpack
from autoeff.dashboard.fetch import Snapshot, Terrain, snapshot, terrain
from autoeff.dashboard.visit import Visitor
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.store import Store

SCOPES = {
    "all": ("jobs:read", "jobs:write", "admin"),
    "reader": ("jobs:read",),
    "stranger": ("jobs:read", "jobs:write"),
    "eve": ("jobs:read", "jobs:write"),
    "carol": ("jobs:read", "jobs:write"),
    "dan": ("jobs:read", "jobs:write"),
}
OWNERS = {"stranger": "bob", "eve": "eve", "carol": "carol", "dan": "dan"}


@dataclass
class Plant:
    """A server that listens.

    Attributes:
        home: Its folder.
        keys: Texts: `all` may do everything, `reader` only read, `stranger` owns nothing, `eve`, `carol` and `dan` what tests add.
        job: Id of the finished search.
        visitors: Who has looked so far, by key.
    """

    url: str
    home: Path
    store: Store
    keys: dict[str, str]
    job: str
    visitors: dict[str, Visitor] = field(default_factory=dict)

    def visitor(self, who: str = "all") -> Visitor:
        if who not in self.visitors:
            client = Client(self.url, self.keys[who], timeout_s=60.0, attempts=2)
            self.visitors[who] = Visitor(client, client.own_key())
        return self.visitors[who]


@pytest.fixture(scope="session", autouse=True)
def _configured() -> None:
    """As `dashboard/.streamlit/config.toml` has it; with all that tests import, to look through every object takes a page 0.3 s."""
    config.set_option("runner.postScriptGC", False)


@pytest.fixture(autouse=True)
def _same_program() -> Iterator[None]:
    """A page under test takes the place of this program, with which processes that are spawned later would begin."""
    program = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = program


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    home = tmp_path_factory.mktemp("dashboard")
    unpack(home)
    with Store.open(f"sqlite:///{home / 'autoeff.db'}") as store:
        ring = KeyRing(store.database)
        keys = {name: ring.make(name, OWNERS.get(name, "local"), scopes)[1].text for name, scopes in SCOPES.items()}
        # A process of its own: what it starts would begin with the script of a page under test, which takes the place of this program.
        with _serving(home) as url:
            found = Plant(url, home, store, keys, store.jobs(1)[0].id)
            yield found
            for one in found.visitors.values():
                one.client.close()


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """`serving(home, *flags)`: a server over this home, as a context with its URL."""
    return _serving


@contextmanager
def _serving(home: Path, *flags: str) -> Iterator[str]:
    """The URL of a server over this home."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTOEFF_")}
    environment |= {"AUTOEFF_HOME": str(home), "AUTOEFF_CALLS_PER_MINUTE": "0", "AUTOEFF_MEMORY_CAP_BYTES": "3GiB"}
    command = [sys.executable, "-m", "autoeff.cli", "serve", "--port", "0", *(flags or ("--no-coordinator",))]
    with (home / "serve.log").open("wb") as log, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log) as server:
        assert server.stdout is not None
        told = server.stdout.readline().decode()
        assert told.startswith("export AUTOEFF_SERVER="), (home / "serve.log").read_text()
        try:
            yield told.strip().partition("=")[2]
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def client(plant: Plant) -> Client:
    return plant.visitor().client


@pytest.fixture(scope="session")
def shown(plant: Plant, client: Client) -> Snapshot:
    """The finished search."""
    return snapshot(client, plant.job)


@pytest.fixture(scope="session")
def ground(shown: Snapshot, client: Client) -> Terrain:
    """What it searched."""
    found = terrain(client, shown.job)
    assert found is not None
    return found


def _copy(base: sqlite3.Connection, table: str, where: str, **changed: Any) -> None:
    """Adds the rows of a table again, changed so."""
    found = base.execute(f"SELECT * FROM {table} WHERE {where}")
    names = [column[0] for column in found.description]
    for row in found.fetchall():
        values = {**dict(zip(names, row, strict=True)), **changed}
        base.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", list(values.values()))


def _copy_job(base: sqlite3.Connection, job: str, new: str, *, first: int, spec: Mapping[str, Any], **changed: Any) -> None:
    """Adds a job like this one with its first trials: one that differs in these fields of its spec and these columns."""
    before = json.loads(base.execute("SELECT spec FROM job WHERE id = ?", (job,)).fetchone()[0])
    _copy(base, "job", f"id = '{job}'", id=new, spec=json.dumps({**before, **spec}), **changed)
    _copy(base, "trial", f"job_id = '{job}' AND number < {first}", job_id=new)


@pytest.fixture(scope="session")
def copy_job() -> Callable[..., None]:
    """`copy_job(base, job, new, first=…, spec={…}, **columns)`: a job like this one with its first trials, changed so."""
    return _copy_job


@pytest.fixture(scope="session")
def twins(plant: Plant) -> tuple[str, str, str]:
    """Carol's: the finished search; one of another seed and limit that failed early, its last trial too; one of another text."""
    ids = ("aaaa0000ca20", "bbbb0000ca20", "cccc0000ca20")
    with closing(sqlite3.connect(plant.home / "autoeff.db")) as base, base:
        preflight = json.loads(base.execute(f"SELECT preflight FROM job WHERE id = '{plant.job}'").fetchone()[0])
        preflight["text"]["search"]["digest"] = "0"
        other = {"seed": 7, "limits": ["avg_bits<=4"]}
        failed = {"state": "failed", "result": None, "queue": "cpu", "trials": 151, "failed": 1}
        _copy_job(base, plant.job, ids[0], first=10**6, spec={}, owner="carol")
        _copy_job(base, plant.job, ids[1], first=150, spec=other, owner="carol", **failed)
        _copy_job(base, plant.job, ids[2], first=0, spec={}, owner="carol", preflight=json.dumps(preflight), result=None)
        _copy(base, "evaluation", "id = 1", id=10**6, eval_key="f" * 64, state="failed")
        _copy(base, "trial", f"job_id = '{plant.job}' AND number = 150", job_id=ids[1], evaluation_id=10**6)
    return ids


View = Callable[..., AppTest]

_SCRIPT = """
import streamlit as st
from autoeff.dashboard import visit
from autoeff.dashboard.views import {name}

st.session_state["pages"] = {{name: None for name in ("jobs", "job", "configuration", "budget", "submit", "compare", "hardware", "keys")}}
with visit.guarded(st.session_state["visitor"]):
    {name}.draw(st.session_state["visitor"])
"""


@pytest.fixture
def view(plant: Plant) -> View:
    """`view(name, who="all", **query)`: that view, drawn once for the bearer of this key."""

    def draw(name: str, who: str = "all", **query: Any) -> AppTest:
        page = AppTest.from_string(_SCRIPT.format(name=name), default_timeout=60)
        page.session_state["visitor"] = plant.visitor(who)
        for key, value in query.items():
            page.query_params[key] = str(value)
        return page.run()

    return draw


def said(page: AppTest) -> str:
    """Every text on a page, as it is read."""
    kinds = ("title", "header", "subheader", "markdown", "caption", "text", "code", "success", "info", "warning", "error")
    parts = [str(element.value) for kind in kinds for element in getattr(page, kind)]
    parts += [f"{one.label} {one.value} {one.delta}" for one in page.metric] + [one.label for one in page.button]
    parts += [frame.value.to_string() for frame in page.dataframe]
    return "\n".join(parts).replace("\\", "").replace("\u2060", "")


@pytest.fixture(scope="session")
def words() -> Callable[[AppTest], str]:
    """`words(page)`: every text on it."""
    return said


_MARKUP = [
    '<b data-hostile="1">bold</b>',
    "<script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1" data-hostile="1">',
    '<svg onload="window.pwned=1" data-hostile="1">',
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<style>*{display:none}</style>",
    '"><h1 data-hostile="1">',
    "</textarea><b data-hostile=1>",
    "<a href='javascript:pwned=1'>x</a>",
    "[x](javascript:window.pwned=1)",
    "![x](http://192.0.2.1/x.png)",
    "**strong**",
    "__strong__",
    "# heading",
    "- list",
    "1. list",
    "> quote",
    "`code`",
    "```\nfence\n```",
    "~~gone~~",
    "$x^2$",
    "$$x$$",
    ":red[red]",
    ":blue-background[b]",
    ":material/home:",
    ":smile:",
    ":badge[x]",
    "| a | b |\n|---|---|",
    "---",
    "[^1]",
    "&lt;b&gt;",
    "&#60;b&#62;",
    "http://192.0.2.1/",
    "\\*not\\*",
    "{{7*7}}",
    "%{customdata[0]}",
    "${7*7}",
    "%s%n",
    "\x00nul\x07bell\x1b[31m",
    "\x7fdel\x85",
    "\u202eevil",
    "a\u200bb\u2060c\ufeff",
    "\u05e9\u05dc\u05d5\u05dd \u202d<x>",
    "\U0001f600",
    "e\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301\u0301",
    "\u2028line\u2029",
    "\n\n\n",
    "                                        ",
    "x" * 10_000,
    "'; DROP TABLE job; --",
]


@pytest.fixture(scope="session")
def hostile_names() -> list[str]:
    """Fifty names that somebody might give to a model or a key; what no database stores is left out."""
    assert len(_MARKUP) == 50
    return [name.replace("\x00", "\x01") for name in _MARKUP]


@pytest.fixture(scope="session")
def add_jobs() -> Callable[[Path, str, Sequence[str]], list[str]]:
    """`add_jobs(database, job, names)`: failed jobs like this one with such a model, limit, sampler and error, eve's; their ids."""

    def add(path: Path, job: str, names: Sequence[str]) -> list[str]:
        ids = [f"{number:012x}" for number in range(0xBAD000, 0xBAD000 + len(names))]
        with closing(sqlite3.connect(path)) as base, base:
            ((begun,),) = base.execute("SELECT created_at FROM job WHERE id = ?", (job,)).fetchall()
            for number, (new, name) in enumerate(zip(ids, names, strict=True), start=1):
                counts = dict.fromkeys(("trials", "succeeded", "failed", "quarantined"), 0)
                changed = {"state": "failed", "result": None, "error": name, "owner": "eve", "created_at": begun + number, **counts}
                _copy_job(base, job, new, first=0, spec={"model": name, "sampler": name}, **changed)
        return ids

    return add
