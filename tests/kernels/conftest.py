"""Where a kernel can run: in Triton's interpreter (a process of its own) or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs a kernel in Triton's interpreter; test_interpreter.py starts the process for it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        waiting = [item for item in items if item.get_closest_marker("interpreted")]
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if item not in waiting]


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """NaN in whatever a launcher allocates, so that an interpreted kernel that leaves a hole is seen."""
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; tests that need it skip where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
