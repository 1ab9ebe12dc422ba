"""Preparations that are kept: the same object while nothing behind it has changed, a new one as soon as something has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
    assert prepared(setup(knobs={"skip": {}}), elsewhere=True).space is not first.space
    text.write_text(text.read_text() + "and one line more\n" * 40)
    second = prepared(setup(), elsewhere=True)
    assert second.digest == prepare(setup(), elsewhere=True).digest != first.digest
    os.utime(model / "config.json", ns=(1, 1))
    assert prepared(setup(), elsewhere=True) is not second
    prepared(replace(setup(), hardware="cpu"), elsewhere=True)
    prepared(replace(setup(), hardware="gpu.any"), elsewhere=True)
    assert len(prepared._prepared._known) == 2
