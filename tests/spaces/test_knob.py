"""Settings of knobs, and the swap of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from autoeff.errors import InputError
from autoeff.spaces import knob as module
from autoeff.spaces.knob import Kind, Knob, make_knob, swap


@dataclass(frozen=True)
class _Settings(Knob):
    name: ClassVar[str] = "settings"
    kind: ClassVar[Kind] = "weight"

    flag: bool = False
    count: int = 1
    share: float = 0.5
    word: str = "x"
    numbers: tuple[int, ...] = ()

    def sites(self, structure):
        return []

    def levels(self, site):
        return ()

    def cost(self, site, level):
        return {}

    def apply(self, model, site, level, decoded):
        return swap(model, {})


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plugin", lambda *_: _Settings)


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("flag", "true", True), ("flag", "False", False), ("flag", True, True),
        ("count", "32", 32), ("count", 32, 32),
        ("share", "0.25", 0.25), ("share", "1", 1.0), ("share", 2, 2.0),
        ("word", "7", "7"),
        ("numbers", "8,4", (8, 4)), ("numbers", [8, 4], (8, 4)), ("numbers", "3", (3,)),
    ],
)  # fmt: skip
def test_settings_are_converted_to_their_type(key: str, given: Any, value: Any) -> None:
    made = make_knob("settings", {key: given}).settings()[key]
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("flag", "yes", "settings.flag must be of type bool: got 'yes'"),
        ("flag", 1, "settings.flag must be of type bool: got 1"),
        ("count", "many", "settings.count must be of type int: got 'many'"),
        ("count", 1.5, "settings.count must be of type int: got 1.5"),
        ("count", True, "settings.count must be of type int: got True"),
        ("share", None, "settings.share must be of type float: got None"),
        ("word", 3, "settings.word must be of type str: got 3"),
        ("numbers", "8,x", "settings.numbers must be of type list of int: got '8,x'"),
        ("numbers", 8, "settings.numbers must be of type list of int: got 8"),
        ("size", 8, "unknown setting settings.size; known: flag, count, share, word, numbers"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(key: str, given: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_knob("settings", {key: given})
    assert str(caught.value) == message


def test_settings_rebuild_the_same_knob() -> None:
    made = make_knob("settings", {"count": 7, "numbers": [1, 2]})
    assert make_knob("settings", made.settings()) == made


def test_swap_points_to_the_given_memory_and_back() -> None:
    model = nn.Linear(4, 3)
    before, kept = model.weight, model.weight.data_ptr()
    other = torch.ones(3, 4)
    undo = swap(model, {"weight": other})
    assert model.weight is before
    assert model.weight.data_ptr() == other.data_ptr()
    undo()
    assert model.weight is before
    assert model.weight.data_ptr() == kept


def test_swap_converts_to_the_dtype_of_the_model() -> None:
    model = nn.Linear(4, 3)
    swap(model, {"weight": torch.ones(3, 4, dtype=torch.float16)})
    assert model.weight.dtype == torch.float32
    assert model(torch.ones(4)).dtype == torch.float32


def test_swap_that_does_not_fit_changes_nothing() -> None:
    model = nn.Linear(4, 3)
    kept = model.bias.data_ptr()
    with pytest.raises(ValueError, match=r"weight is \(3, 4\): got \(4, 3\)"):
        swap(model, {"bias": torch.zeros(3), "weight": torch.zeros(4, 3)})
    assert model.bias.data_ptr() == kept
