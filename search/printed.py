"""What candidates print: a file that does not grow without end, and which part of it is the present one's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from autoeff.errors import CandidateError, FailureClass

__all__ = ["MOST_BYTES", "Printed"]

MOST_BYTES = 10 << 20
"""One candidate that prints more fails; a file that has more is begun anew."""


class Printed:
    """The log of one runner.

    Args:
        path: The file, to which processes append.
        kept: Bytes of the end of what a candidate printed that are kept with its result.
    """

    def __init__(self, path: Path, kept: int) -> None:
        self._path, self._kept, self._start = path, kept, 0

    def begin(self) -> None:
        """What is printed from now on is the next candidate's."""
        self._start = self._size()
        if self._start > MOST_BYTES:
            os.truncate(self._path, 0)
            self._start = 0

    def file(self) -> BinaryIO:
        """The file, to be handed to a process."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._path.open("ab")

    def check(self) -> None:
        """Looks how much it is.

        Raises:
            CandidateError: More than `MOST_BYTES`.
        """
        if self._size() - self._start > MOST_BYTES:
            raise CandidateError(FailureClass.INVALID, f"printed more than {MOST_BYTES >> 20} MiB")

    def watched(self, tick: Callable[[], None]) -> Callable[[], None]:
        """`tick`, and then `check`."""

        def look() -> None:
            tick()
            self.check()

        return look

    def tail(self) -> str:
        """The end of what the present candidate printed; nothing where there is no file."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(self._start, self._size() - self._kept))
                return file.read(self._kept).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0
