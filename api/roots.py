"""Which models and texts a request may name: bundled models, what stands under the configured folders, hub ids where allowed.

A name is relative to a root, or an absolute path inside one. Links are followed before that is judged, so that none leads out.
Answers show names as they were given: `hide` takes the roots out of every text that leaves the server.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from autoeff.errors import InputError
from autoeff.search.job import Data, JobSpec

__all__ = ["Roots", "bundled_models"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB = "hub:"
_TASK = re.compile(r"[\w.-]+(:[\w.-]+)*")
_DEPTH = 4
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TEXTS = (".txt", ".md", ".jsonl", ".csv", ".parquet", ".arrow")


class Roots:
    """The folders that requests may reach into.

    Args:
        models: Folders of models.
        data: Folders of texts, and of task files.
        hub: Whether ids of the hub may be named.
        private: Further folders whose paths never leave the server.

    Raises:
        InputError: A folder of models or texts is not there. One that goes later is as one without anything in it.
    """

    def __init__(self, models: Sequence[Path] = (), data: Sequence[Path] = (), *, hub: bool = False, private: Sequence[Path] = ()) -> None:
        for what, variable, paths in (("models", "AUTOEFF_MODEL_ROOTS", models), ("data", "AUTOEFF_DATA_ROOTS", data)):
            if absent := [path for path in paths if not path.is_dir()]:
                raise InputError(f"there is no folder {absent[0]}; --{what} (or {variable}) must name folders that exist")
        self._models, self._data = [p.resolve() for p in models], [p.resolve() for p in data]
        self.hub = hub
        bundled = Path(str(importlib.resources.files("autoeff") / "models"))
        shown = {*self._models, *self._data, *(p.resolve() for p in private), bundled, bundled.resolve()}
        folders = sorted((re.escape(str(p)) for p in shown), key=len, reverse=True)
        self._hidden = re.compile(f"(?:{'|'.join(folders)})(?:/|(?=[^\\w.-]|$))")

    def hide(self, value: Any) -> Any:
        """The same value with no root in its texts: what stands under one is named relative to it."""
        if isinstance(value, str):
            return self._hidden.sub("", value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def resolve(self, spec: JobSpec) -> JobSpec:
        """The job with every path inside a root.

        Raises:
            InputError: It names a model, text or task file that may not be reached from here, or that is not there.
        """
        if spec.metrics:
            raise InputError(
                f"the metric {spec.metrics[0][:80]!r} is code, which a server does not run; search on your own machine with it"
            )
        changes: dict[str, Any] = {"model": self.model(spec.model), "data": self._text(spec.data, "data")}
        if spec.eval_data is not None:
            changes["eval_data"] = self._text(spec.eval_data, "eval_data")
        if spec.tune_data is not None:
            changes["tune_data"] = self._text(spec.tune_data, "tune_data")
        for name in spec.tasks.names:
            if not _TASK.fullmatch(name):
                raise InputError(f"no task is called {name[:80]!r}; name tasks that lm-eval knows, or that stand in tasks.path")
        if spec.tasks.path is not None:
            changes["tasks"] = spec.tasks.model_copy(update={"path": str(self._inside(spec.tasks.path, self._data, "task files"))})
        return spec.model_copy(update=changes)

    def model(self, name: str) -> str:
        """What the engine is to load for a model that a request names.

        Raises:
            InputError: It may not be reached from here, or is not there.
        """
        if name in bundled_models():
            if Path(name).exists():
                raise InputError(f"model {name!r}: a folder of that name stands where the server was started; start it elsewhere")
            return name
        if self.hub and _HUB_ID.fullmatch(name) and not self._found(name, self._models):
            return name
        return str(self._inside(name, self._models, "models"))

    def models(self) -> Iterator[tuple[str, Path]]:
        """Name and folder of every model that may be named, bundled ones first."""
        bundled = Path(str(importlib.resources.files("autoeff") / "models"))
        yield from ((name, bundled / name) for name in bundled_models())
        for root in self._models:
            for folder in _folders(root, _DEPTH):
                if any((folder / weights).is_file() for weights in _WEIGHTS) and (folder / "config.json").is_file():
                    yield str(folder.relative_to(root)), folder

    def texts(self) -> Iterator[tuple[str, Path]]:
        """Name and path of every text file that may be named."""
        for root in self._data:
            for folder in (root, *_folders(root, _DEPTH)):
                for path in _listed(folder):
                    if path.suffix in _TEXTS and path.is_file() and path.resolve().is_relative_to(root):
                        yield str(path.relative_to(root)), path

    def _text(self, data: Data, field: str) -> Data:
        if data.source is None:
            return data
        if self.hub and data.source.startswith(_HUB) and _HUB_ID.fullmatch(data.source.removeprefix(_HUB)):
            return data
        return data.model_copy(update={"source": str(self._inside(data.source, self._data, f"texts ({field}.source)"))})

    def _inside(self, name: str, roots: Sequence[Path], what: str) -> Path:
        found = self._found(name, roots)
        if found is None:
            where = "under the folders that this server was given" if roots else "and this server was given no folder of them"
            raise InputError(f"{name[:200]!r} is not among the {what} {where}; `autoeff serve --help` says how to give one")
        return found

    @staticmethod
    def _found(name: str, roots: Sequence[Path]) -> Path | None:
        for root in roots if name else ():
            try:
                path = (root / name).resolve(strict=True)
            except (OSError, ValueError, RuntimeError):  # not there, too long, a loop of links
                continue
            if path.is_relative_to(root):
                return path
        return None


@lru_cache(1)
def bundled_models() -> tuple[str, ...]:
    """Names of the models that the package brings."""
    folder = importlib.resources.files("autoeff") / "models"
    return tuple(sorted(item.name for item in folder.iterdir() if item.is_dir() and item.joinpath("config.json").is_file()))


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Folders below `root`, links left out, the nearer ones first."""
    if not depth:
        return
    children = [path for path in _listed(root) if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")]
    yield from children
    for child in children:
        yield from _folders(child, depth - 1)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # it went, or is not for this user to see
        return []
