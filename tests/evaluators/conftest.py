"""Setups on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeff.evaluators.setup import EvaluationSetup, TextSpec
from autoeff.spaces.space import SpaceSpec

TEXT = "the dog sat on the mat and the cat ate the hat while all the others went there again and again\n" * 60


@pytest.fixture
def setup_of(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[..., EvaluationSetup]:
    """A setup for a tiny model by family; knobs as keyword arguments' names."""

    def make(family: str, knobs: dict[str, dict[str, Any]], *, windows: int = 8, untie: bool = False) -> EvaluationSetup:
        text = tmp_path / "text.txt"
        text.write_text(TEXT)
        data = TextSpec(str(text), windows=windows, length=16)
        return EvaluationSetup(str(tiny_models[family]), data, None, SpaceSpec(knobs, untie=untie), 0, "cpu", str(tmp_path / "bank"))

    return make
