"""What a worker says of its machine."""

from __future__ import annotations

import sys

import pytest
import torch

from autoeff.errors import InputError
from autoeff.search.hardware import hardware, kind_of


def test_this_machine_is_what_torch_sees_of_it() -> None:
    found = hardware()
    assert (found.kind == "cpu") == (not torch.cuda.is_available())
    assert found.facts["torch"] == torch.__version__
    assert found.facts["memory_bytes"] > 1 << 30
    assert found.facts["name"]


@pytest.mark.parametrize(
    ("gpu", "kind"), [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb")]
)
def test_queues_are_named_by_the_model_of_a_gpu(gpu: str, kind: str) -> None:
    assert kind_of(gpu) == kind


def test_a_torch_that_does_not_start_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")
    hardware.cache_clear()
    with pytest.raises(InputError, match="torch does not start here"):
        hardware()
