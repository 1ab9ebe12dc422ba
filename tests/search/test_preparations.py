"""Preparations that are kept: the same object while nothing behind it has changed, a new one as soon as something has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autoeff.evaluators.preparation import prepare
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.search.job import JobSpec
from autoeff.search.preparations import Preparations

Make = Callable[..., JobSpec]


def test_a_preparation_is_made_once_until_a_file_changes(
    tiny_job: Make, tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    text = tmp_path / "texts" / "one.txt"
    text.parent.mkdir()
    shutil.copyfile(tiny_text, text)
    data = {"source": str(text), "windows": 8, "length": 16}

    def setup(**fields: object) -> EvaluationSetup:
        return tiny_job(model=str(model), data=data, eval_data=None, **fields).setup(tmp_path / "bank")

    prepared = Preparations(kept=2)
    first = prepared(setup(), elsewhere=True)
    assert first.digest == prepare(setup(), elsewhere=True).digest
    for same in (setup(), setup(limits=["avg_bits<=4"]), setup(budget={"trials": 99}), setup(sampler="random")):
        assert prepared(same, elsewhere=True) is first
    other = prepared(setup(seed=1), elsewhere=True)
    assert other.digest == prepare(setup(seed=1), elsewhere=True).digest != first.digest
    assert other.space is first.space, "a model is looked through once"
    assert other.footprint is first.footprint
    assert len(prepared._kept["text"]._known) == 1, "a text is tokenised once"
    assert prepared(setup(knobs={"skip": {}}), elsewhere=True).space is not first.space
    text.write_text(text.read_text() + "and one line more\n" * 40)
    second = prepared(setup(), elsewhere=True)
    assert second.digest == prepare(setup(), elsewhere=True).digest != first.digest
    os.utime(model / "config.json", ns=(1, 1))
    assert prepared(setup(), elsewhere=True) is not second
    prepared(replace(setup(), hardware="cpu"), elsewhere=True)
    prepared(replace(setup(), hardware="gpu.any"), elsewhere=True)
    assert len(prepared._kept["preparation"]._known) == 2


@pytest.mark.parametrize("knobs", [{"bits": {"group_size": 16}}, {"bits": {"group_size": 16, "quantizer": "gptq"}}])
def test_what_is_kept_gives_what_a_new_preparation_gives(tiny_job: Make, tiny_text: Path, tmp_path: Path, knobs: dict[str, object]) -> None:
    prepared = Preparations()
    whole = {"source": str(tiny_text), "windows": 8, "length": 16}
    for data in (whole, whole | {"windows": 4}, whole | {"draw": "first"}, whole | {"bos": "per_document"}, whole | {"draw": (3, 40)}):
        for seed in (0, 1):
            setup = tiny_job(knobs=knobs, data=data, eval_data=None, seed=seed).setup(tmp_path / "bank")
            assert prepared(setup).report() == prepare(setup).report()
            assert prepared(setup).digest == prepare(setup).digest


def test_ids_take_a_limited_room(tiny_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoeff.search.preparations._READINGS_BYTES", 0)
    prepared = Preparations()
    setup = tiny_job().setup(tmp_path / "bank")
    assert prepared(setup).digest == prepare(setup).digest
    assert not prepared._kept["text"]._known


def test_a_level_that_was_built_since_is_no_longer_missing(tiny_job: Make, tmp_path: Path) -> None:
    prepared = Preparations()
    setup = tiny_job(knobs={"bits": {"group_size": 16, "quantizer": "gptq"}}).setup(tmp_path / "bank")
    before = prepared(setup).report()["bank_missing_bytes"]
    (path, size), *_ = prepared(setup).footprint.entries.items()
    path.parent.mkdir(parents=True)
    path.touch()
    assert prepared(setup).report()["bank_missing_bytes"] == before - size
    assert prepared(replace(setup, seed=1)).report()["bank_missing_bytes"] == before, "levels are fitted to the text that is drawn"
