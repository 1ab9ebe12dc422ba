"""Archives: nobody waits for one, one that fails is told, and what a kill left is removed."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from autoeff.api.exports import Exports, _locked


class Dying:
    """A room in which everything dies."""

    def start(self, *_: Any) -> Future[None]:
        future: Future[None] = Future()
        future.set_exception(BrokenProcessPool())
        return future


def test_nobody_waits_for_an_export(make_server: Callable[..., Any]) -> None:
    served = make_server()
    served.app.state.context.exporting.start(time.sleep, 600)  # as an export of a large model
    begun = served.ask("POST", f"/v1/jobs/{served.job}/trials/0/export", json={"format": "hf-dense"})
    assert (begun.status_code, begun.json()["state"]) == (202, "building")
    assert served.ask("POST", "/v1/jobs:validate", json=served.tiny).status_code == 200
    listed = {one["name"]: one["state"] for one in served.ask("GET", f"/v1/jobs/{served.job}/artifacts").json()["items"]}
    assert listed["trial-0.hf-dense.tar"] == "building"


def test_an_export_whose_process_died_is_listed(served: Any) -> None:
    exports = Exports(served.settings, served.app.state.context.backroom, Dying())  # type: ignore[arg-type]
    exports.request(served.job, 7, "recipe")
    (found,) = [one for one in exports.all(served.store.job(served.job)) if one["name"] == "trial-7.recipe.tar"]
    assert (found["state"], found["failure"]) == ("failed", "the process that wrote it died; ask for it again")


def test_a_start_removes_what_a_kill_left(make_server: Callable[..., Any], home: Path) -> None:
    """And nothing of an export that another server of this home is at."""
    dead, alive = (home / "jobs" / (job * 12) / "exports" for job in "ab")
    for folder in (dead, alive):
        (folder / ".export-x" / "model").mkdir(parents=True)
        (folder / "trial-1.recipe.tar").touch()
    with _locked(alive, fcntl.LOCK_SH):
        make_server()
    assert [path.name for path in dead.iterdir()] == ["trial-1.recipe.tar"]
    assert (alive / ".export-x" / "model").is_dir()
