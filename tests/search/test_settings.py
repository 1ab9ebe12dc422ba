"""What belongs to the machine is read from the environment, and a wrong value is one line."""

from __future__ import annotations

import psutil
import pytest

from autoeff.errors import InputError
from autoeff.search.settings import Settings


def test_a_memory_cap_is_written_as_people_write_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOEFF_MEMORY_CAP_BYTES", "16GiB")
    assert Settings.read().memory_cap == 16 << 30
    monkeypatch.setenv("AUTOEFF_MEMORY_CAP_BYTES", "123456")
    assert Settings.read().memory_cap == 123456


def test_without_a_cap_a_share_of_the_machine_may_be_held() -> None:
    assert Settings(memory_share=0.5).memory_cap == psutil.virtual_memory().total // 2


@pytest.mark.parametrize("value", ["0", "-1", "much"])
def test_a_cap_that_is_no_size_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOEFF_MEMORY_CAP_BYTES", value)
    with pytest.raises(InputError, match="AUTOEFF_MEMORY_CAP_BYTES"):
        Settings.read()
