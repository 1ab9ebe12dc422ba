"""Result files of benchmarks that make a row at a time: earlier rows stay, unless they are about the same or were made under other settings."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
import transformers

__all__ = ["add_rows"]

Row = Mapping[str, Any]


def add_rows(
    path: Path,
    rows: Sequence[Row],
    key: Callable[[Row], tuple[Any, ...]],
    settings: Row,
    means: Callable[[list[Row]], Any] | None = None,
) -> list[Row]:
    """Writes `rows` to `path` and returns all that it then holds, in the order of their keys.

    Args:
        path: JSON file, made where absent.
        rows: New ones.
        key: What a row is about.
        settings: What every row of the file was made under; rows made under others are dropped.
        means: What is said of all rows together.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    old = stored["rows"] if stored and all(stored.get(name) == value for name, value in settings.items()) else []
    every = {key(row): row for row in [*old, *rows]}
    kept = [every[name] for name in sorted(every)]
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, optuna)},
        **settings,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(head | ({"means": means(kept)} if means else {}) | {"rows": kept}, indent=1) + "\n")
    return kept
