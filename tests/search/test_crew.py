"""How many evaluations are in flight."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from autoeff.search.crew import Away
from autoeff.search.settings import Settings
from autoeff.search.storage import Store


@pytest.mark.parametrize(("workers", "width"), [(0, 1), (1, 1), (15, 15), (16, 17), (64, 68)])
def test_every_worker_has_an_evaluation_and_many_workers_find_some_more(workers: int, width: int, tmp_path: Path) -> None:
    with Store.open(Settings(home=tmp_path).database) as store:
        for number in range(workers):
            store.announce_worker(f"host/boot/{number}/0.00", ["cpu"], "cpu", {}, 60.0)
        store.announce_worker("host/boot/99/0.00", ["gpu.any"], "h200", {}, 60.0)
        store.announce_worker("host/boot/98/0.00", ["cpu"], "cpu", {}, 0.0)  # gone
        crew = Away(store, "cpu", threading.Event(), threading.Event())
        assert crew.width() == width
