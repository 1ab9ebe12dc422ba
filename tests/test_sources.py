"""What the reading verbs say of a trial beside its values."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from autoeff.cli import Form, _print_trial
from autoeff.sources import shown

USE = {"packed_linears": 24, "packed_calls": 192, "decoded_linears": 0}


@dataclass(frozen=True)
class Tried:
    accepted: bool
    facts: dict[str, int] = field(default_factory=dict)
    log: str | None = None


def test_a_trial_shows_how_the_attempt_that_counts_was_computed(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"trial": 3, "measurements": {}, "configuration": {"a:bits": 4}}
    found = shown(row, [Tried(accepted=False, facts={"packed_linears": 9}), Tried(accepted=True, facts=USE, log="said")])
    assert (found.row, found.logs) == ({**row, "facts": USE}, [None, "said"])
    _print_trial(found, Form.TABLE)
    assert "packed_calls     192" in capsys.readouterr().out
    assert shown(row, [Tried(accepted=True)]).row == row
