"""Where text comes from: files, directories, JSONL, CSV of scored pairs, and the source files of an installed package."""

from __future__ import annotations

import codecs
import csv
import hashlib
import importlib.metadata
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from autoeff.errors import InputError

__all__ = ["PackageText", "ScoredPair", "Text", "read_package", "read_pairs", "read_text"]

_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
_PACKAGE = "package:"
_PAIR_COLUMNS = ("sentence1", "sentence2", "score")
_CSV_LIMIT = 64 << 20


@dataclass(frozen=True)
class Text:
    """What was read of a source.

    Attributes:
        documents: One for each file or JSONL line, as they stand.
        complete: False where reading stopped at the limit.
        name: What was read, for reports.
    """

    documents: tuple[str, ...]
    complete: bool
    name: str


@dataclass(frozen=True)
class PackageText:
    """The Python source files of an installed distribution.

    Attributes:
        name: Of the distribution.
        version: Installed.
        sha256: Over the names and contents of the files.
        documents: One for each file, sorted by path.
    """

    name: str
    version: str
    sha256: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences and how alike people found them."""

    first: str
    second: str
    score: float


def read_text(source: str, limit_bytes: int) -> Text:
    """The text of a source, of its first `limit_bytes` at most.

    Args:
        source: A text file, a JSONL file of `{"text": ...}`, a directory of such files (recursively, sorted), or `package:NAME`.
        limit_bytes: Where reading stops; a file is cut there, a JSONL line is not.

    Raises:
        InputError: There is no text, or what is there cannot be read as UTF-8 text.
    """
    if source.startswith(_PACKAGE):
        package = read_package(source.removeprefix(_PACKAGE))
        return Text(package.documents, True, f"package {package.name} {package.version}")
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"{path} holds no text: expected files that end in {', '.join(_SUFFIXES)}")
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"text {source!r} does not exist; expected a file, a directory, or package:NAME of an installed package")
    documents: list[str] = []
    left = limit_bytes
    for file in files:
        if left <= 0:
            return Text(tuple(documents), False, str(path))
        read = _jsonl(file, left) if file.suffix == ".jsonl" else _plain(file, left)
        for document, size in read:
            documents.append(document)
            left -= size
    complete = left >= 0 and (len(files) > 1 or _size(files[0]) <= limit_bytes)
    if not any(document.strip() for document in documents):
        raise InputError(f"{path} holds no text: it is empty or all white space")
    return Text(tuple(documents), complete, str(path))
