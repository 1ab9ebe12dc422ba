"""Preparations and plans that are kept: tokenising a text and tracing a model take seconds, and many jobs are about the same ones."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from autoeff.evaluators.ground import Ground, ground_of
from autoeff.evaluators.loading import resolve_model
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import EvaluationSetup, TextSpec
from autoeff.evaluators.text import encoded
from autoeff.search.job import JobSpec
from autoeff.search.model import Plan, plan
from autoeff.search.settings import Settings
from autoeff.spaces.configuration import digest_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from autoeff.evaluators.sources import Text
    from autoeff.spaces.space import SpaceSpec

__all__ = ["Preparations"]

_IDS_BYTES = 64 << 20
"""Of the ids of whole texts, which jobs of other seeds and windows draw from."""

T = TypeVar("T")


class Preparations:
    """Stands where `prepare` does, and remembers the last ones while no file behind them has changed.

    Safe to share between threads. Whether a file changed is told by its size, its times and its place on the disk; who evaluates compares
    the digests of what is in it.

    Args:
        kept: How many, and of the plans how many.
    """

    def __init__(self, kept: int = 16) -> None:
        self._prepared = _Recent[Preparation](kept, lambda item: 1)
        self._plans = _Recent[Plan](kept, lambda item: 1)
        self._grounds = _Recent[Ground](kept, lambda item: 1)
        self._ids = _Recent["Tensor"](_IDS_BYTES, lambda ids: ids.numel() * ids.itemsize)

    def __call__(self, setup: EvaluationSetup, *, elsewhere: bool = False) -> Preparation:
        """As `prepare`."""
        key = digest_of([setup.to_json(), elsewhere, _stamps(setup)])
        return self._prepared.get(key, lambda: prepare(setup, elsewhere=elsewhere, encode=self._encoded, ground=self._ground))

    def plan(self, spec: JobSpec, settings: Settings, queue: str | None = None) -> Plan:
        """As `plan`; equal jobs share one."""
        key = digest_of([spec.model_dump(mode="json"), queue, str(settings.home), settings.memory_cap, _stamps(spec.setup(settings.bank))])
        return self._plans.get(key, lambda: plan(spec, settings, queue, self))

    def _ground(self, model: str, spec: SpaceSpec, batch: int, context: int | None) -> Ground:
        key = digest_of([_stamp(resolve_model(model)), asdict(spec), batch, context])
        return self._grounds.get(key, lambda: ground_of(model, spec, batch, context))

    def _encoded(self, tokenizer: PreTrainedTokenizerBase, text: Text, bos: str) -> Tensor:
        named = hashlib.sha256(digest_of([_stamp(Path(tokenizer.name_or_path)), bos]).encode())
        for document in text.documents:
            if not isinstance(document, str):
                return encoded(tokenizer, text, bos)
            named.update(b"\0" + document.encode("utf-8", "surrogatepass"))
        return self._ids.get(named.hexdigest(), lambda: encoded(tokenizer, text, bos))


class _Recent(Generic[T]):
    """What was asked for last, up to a total size."""

    def __init__(self, room: int, size: Callable[[T], int]) -> None:
        self._room, self._size = room, size
        self._known: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        found = make()
        with self._lock:
            self._known[key] = found
            while sum(map(self._size, self._known.values())) > self._room:
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
