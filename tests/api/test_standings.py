"""Fronts that a server keeps between its starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoeff.api.standings import Standings
from autoeff.search.standing import Tally, standing_of


def test_a_standing_is_gone_on_from_where_its_file_ends(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(served.store.job(served.job), result=None)  # as it was before it was summed up
    half = job.counts.trials // 2
    begun = next(event.seq for event in served.store.events(job.id) if event.body.get("trial") == half)
    early = replace(job, counts=replace(job.counts, trials=half), events=begun)
    standing = standing_of(served.store, job)
    before = Standings(served.store, tmp_path.joinpath, written_after=1).of(early)
    assert before != standing
    monkeypatch.setattr(Tally, "read_all", None)
    assert Standings(served.store, tmp_path.joinpath).of(job) == standing
    monkeypatch.undo()
    file = tmp_path / job.id / "standing.json"
    whole = file.read_text()
    for damaged in ("{", "[]", '{"format": 1}', '{"format": 2}', whole.replace(f'"seen": {begun}', '"seen": 99999999')):
        assert damaged != whole
        file.write_text(damaged)
        assert Standings(served.store, tmp_path.joinpath).of(job) == standing
