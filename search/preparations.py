"""Preparations that are kept: tokenising a text and tracing a model take seconds, and many jobs are about the same ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from autoeff.evaluators.loading import resolve_model
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.evaluators.text import TextSpec
from autoeff.spaces.configuration import digest_of

__all__ = ["Preparations"]


class Preparations:
    """Stands where `prepare` does, and remembers the last ones while no file behind them has changed.

    Safe to share between threads. Whether a file changed is told by its size, its times and its place on the disk; who evaluates compares
    the digests of what is in it.

    Args:
        kept: How many.
    """

    def __init__(self, kept: int = 16) -> None:
        self._kept = kept
        self._known: OrderedDict[str, Preparation] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, setup: EvaluationSetup, *, elsewhere: bool = False) -> Preparation:
        """As `prepare`."""
        key = digest_of([setup.to_json(), elsewhere, _stamps(setup)])
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        found = prepare(setup, elsewhere=elsewhere)
        with self._lock:
            self._known[key] = found
            while len(self._known) > self._kept:
                self._known.popitem(last=False)
        return found


def _stamps(setup: EvaluationSetup) -> list[Any]:
    """What changes with the files behind a setup; those of the level bank too, for the bytes that are still to be written."""
    texts = [value.source for value in vars(setup).values() if isinstance(value, TextSpec)]
    tasks = None if setup.tasks is None else setup.tasks.path
    named = [Path(name) for name in (*texts, tasks) if name is not None]
    return [_stamp(resolve_model(setup.model)), _stamp(Path(setup.bank)), *(_stamp(place, deep=True) for place in named)]


def _stamp(place: Path, *, deep: bool = False) -> list[Any]:
    if not place.exists():  # of the hub or a package
        return [str(place)]
    files = [place] if place.is_file() else sorted(place.rglob("*") if deep else place.iterdir())
    found = ((file, file.stat()) for file in files if file.exists())
    return [[str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino] for file, stat in found]
