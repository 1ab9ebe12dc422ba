"""Preparations and plans that are kept: tokenising a text and tracing a model take seconds, and many jobs are about the same ones."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from autoeff.evaluators.loading import resolve_model
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import EvaluationSetup, TextSpec
from autoeff.evaluators.text import Reading
from autoeff.search.job import JobSpec
from autoeff.search.model import Plan, plan
from autoeff.search.settings import Settings

__all__ = ["Preparations"]

_READINGS_BYTES = 64 << 20
"""Of the ids of whole texts, which jobs of other seeds and windows draw from."""

T = TypeVar("T")


class Preparations:
    """Stands where `prepare` does, and remembers the last ones and what they were made of while no file behind them has changed.

    Whether a file changed is told by its size, its times and its place on the disk; who evaluates compares the digests of what is in it.
    Not to be shared between threads: tokenizers are not.

    Args:
        kept: How many of each kind of thing.
    """

    def __init__(self, kept: int = 16) -> None:
        self._kept: defaultdict[str, _Recent] = defaultdict(lambda: _Recent(kept))
        self._stamps: dict[str, list[Any]] = {}  # as of the present call

    def __call__(self, setup: EvaluationSetup, *, elsewhere: bool = False) -> Preparation:
        """As `prepare`."""
        self._stamps.clear()
        return self._prepared(setup, elsewhere=elsewhere)

    def plan(self, spec: JobSpec, settings: Settings, queue: str | None = None) -> Plan:
        """As `plan`; equal jobs share one."""
        self._stamps.clear()
        setup = spec.setup(settings.bank)
        key = [spec.model_dump(mode="json"), queue, str(settings.home), settings.memory_cap, _stored(setup)]
        return self._keep("plan", key, _files(setup), lambda: plan(spec, settings, queue, self._prepared))

    def _prepared(self, setup: EvaluationSetup, *, elsewhere: bool) -> Preparation:
        key = [setup.to_json(), elsewhere]
        return self._keep("preparation", key, _files(setup), lambda: prepare(setup, elsewhere=elsewhere, keep=self._keep))

    def _keep(self, kind: str, key: Sequence[Any], places: Sequence[str | Path], make: Callable[[], T]) -> T:
        named = json.dumps([*key, *map(self._stamp, places)])  # in its order, by which the last of several globs holds
        return self._kept[kind].get(hashlib.sha256(named.encode()).hexdigest(), make)

    def _stamp(self, name: str | Path) -> list[Any]:
        if str(name) not in self._stamps:
            place = Path(name)
            if not place.exists():  # a column of a file, or of the hub
                place = Path(str(name).partition("#")[0])
            self._stamps[str(name)] = [str(name), *_stamps(sorted(place.rglob("*")) if place.is_dir() else [place])]
        return self._stamps[str(name)]


class _Recent:
    """What was asked for last, so many things and not too many ids."""

    def __init__(self, kept: int) -> None:
        self._room = kept
        self._known: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str, make: Callable[[], T]) -> T:
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._known[key] = make()
        found: T = self._known[key]
        while len(self._known) > self._room or sum(map(_bytes, self._known.values())) > _READINGS_BYTES:
            self._known.popitem(last=False)
        return found


def _bytes(kept: Any) -> int:
    return kept.ids.nbytes if isinstance(kept, Reading) else 0


def _files(setup: EvaluationSetup) -> list[str | Path]:
    """Those behind a setup, and their folders."""
    texts = [value.source for value in vars(setup).values() if isinstance(value, TextSpec)]
    tasks = None if setup.tasks is None else setup.tasks.path
    return [resolve_model(setup.model), *(name for name in (*texts, tasks) if name is not None)]


def _stored(setup: EvaluationSetup) -> list[Any]:
    """What changes with the first levels that are built, for the bytes that are still to be written; the bank has thousands of files."""
    bank = Path(setup.bank)
    return _stamps(sorted(bank.iterdir())) if bank.is_dir() else []


def _stamps(files: Sequence[Path]) -> list[Any]:
    found = ((file, file.stat()) for file in files if file.exists())
    return [[str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino] for file, stat in found]
