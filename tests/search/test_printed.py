"""The log of a runner: what is the present candidate's, and how much it may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoeff.errors import CandidateError, FailureClass
from autoeff.search.printed import MOST_BYTES, Printed


def test_the_end_of_what_the_present_candidate_printed_is_kept(tmp_path: Path) -> None:
    printed = Printed(tmp_path / "logs" / "runner.log", kept=8)
    assert printed.tail() == ""
    for text, end in (("first", "first"), ("the second one", "cond one"), ("", "")):
        printed.begin()
        with printed.file() as log:
            log.write(text.encode())
        assert printed.tail() == end
        printed.check()


def test_a_candidate_that_prints_without_end_fails_and_the_file_is_begun_anew(tmp_path: Path) -> None:
    printed = Printed(tmp_path / "runner.log", kept=8)
    printed.begin()
    with printed.file() as log:
        log.write(b"x" * MOST_BYTES)
        log.flush()
        printed.check()
        log.write(b"y")
        log.flush()
        with pytest.raises(CandidateError, match="printed more than 10 MiB") as caught:
            printed.check()
        assert caught.value.failure is FailureClass.INVALID
        assert printed.tail() == "xxxxxxxy"
        printed.begin()
        printed.check()
        log.write(b"next")
    assert printed.tail() == "next"
    assert (tmp_path / "runner.log").stat().st_size == 4
