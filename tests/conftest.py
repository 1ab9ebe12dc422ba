"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("AUTOEFF_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip("real models are not at hand; set AUTOEFF_SHARED")
    return folder
