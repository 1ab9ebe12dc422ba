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


@pytest.mark.parametrize(
    ("family", "knobs", "fields"),
    [
        ("llama", {"bits": {"group_size": 16}}, {}),
        ("llama", {"bits": {"group_size": 16, "quantizer": "gptq"}}, {}),
        ("llama", {"bits": {"group_size": 16, "quantizer": "gptq"}, "lora_rank": {}}, {"tune_data": {"windows": 4, "length": 16}}),
        ("bert", {"bits": {"group_size": 16}}, {}),
    ],
)
def test_what_is_kept_gives_what_a_new_preparation_gives(
    tiny_job: Make, tiny_text: Path, tmp_path: Path, family: str, knobs: dict[str, object], fields: dict[str, dict[str, object]]
) -> None:
    prepared = Preparations()
    whole: dict[str, object] = {"source": str(tiny_text), "windows": 8, "length": 16}
    others = {name: value | {"source": str(tiny_text)} for name, value in fields.items()}
    changes: list[dict[str, object]] = [{"windows": 4}, {"draw": "first"}, {"draw": (3, 40)}]
    for data in (whole, *(whole | change for change in [*changes, *([{"bos": "per_document"}] if family == "llama" else [])])):
        for seed in (0, 1):
            setup = tiny_job(family, knobs=knobs, data=data, eval_data=None, seed=seed, **others).setup(tmp_path / "bank")
            assert prepared(setup).report() == prepare(setup).report()
            assert prepared(setup).digest == prepare(setup).digest


def test_the_last_of_several_globs_holds_also_in_what_is_kept(tiny_job: Make, tmp_path: Path) -> None:
    prepared = Preparations()
    globs = {"*:bits": [8], "*.o_proj:bits": [4]}
    for levels in (globs, dict(reversed(globs.items()))):
        setup = tiny_job(space={"levels": levels}).setup(tmp_path / "bank")
        assert prepared(setup).space == prepare(setup).space


def test_a_package_that_is_installed_anew_is_read_anew(tiny_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Preparations()
    setup = tiny_job(data={"source": "package:pytest-timeout", "windows": 2, "length": 16}, eval_data=None).setup(tmp_path / "bank")
    prepared(setup)
    prepared(replace(setup, seed=1))
    assert len(prepared._kept["text"]._known) == 1
    monkeypatch.setattr("autoeff.evaluators.text.installed", lambda name: "another version")
    prepared(replace(setup, seed=2))
    assert len(prepared._kept["text"]._known) == 2


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
