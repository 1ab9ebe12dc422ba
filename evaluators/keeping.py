"""What jobs share: it is worked out once where somebody keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

__all__ = ["Keep", "anew"]

T = TypeVar("T")


class Keep(Protocol):
    """May give what was made before."""

    def __call__(self, kind: str, key: Sequence[Any], places: Sequence[str | Path], make: Callable[[], T]) -> T:
        """What `make` gives.

        Args:
            kind: Of thing; as many of each are kept as there is room for.
            key: All that it depends on, as plain data, but for files.
            places: Those files, and folders of them.
            make: Makes it.
        """


def anew(kind: str, key: Sequence[Any], places: Sequence[str | Path], make: Callable[[], T]) -> T:
    """Keeps nothing."""
    return make()
