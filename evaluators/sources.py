"""Where text comes from: files, directories, JSONL, CSV of scored pairs, and the source files of an installed package.

Parquet, arrow and the hub are read in `dataset`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import importlib.metadata
import io
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from autoeff.errors import InputError
from autoeff.evaluators.chat import CHAT_COLUMNS, Conversation, conversation
from autoeff.evaluators.checkpoint import existing_path

__all__ = ["PACKAGE", "SUFFIXES", "PackageText", "ScoredPair", "Text", "installed", "read_package", "read_pairs", "read_text"]

SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
PACKAGE = "package:"
"""In front of the name of a distribution."""
_PAIR_COLUMNS = ("sentence1", "sentence2", "score")
_CSV_LIMIT = 64 << 20
_LINE_LIMIT = 16 << 20  # of a JSONL file


@dataclass(frozen=True)
class Text:
    """What was read of a source.

    Attributes:
        documents: One for each file, or row of JSONL or of a data set, as they stand; rows may hold conversations.
        complete: False where reading stopped at the limit.
        name: What was read, for reports.
    """

    documents: tuple[str | Conversation, ...]
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

    def text(self, limit_bytes: int) -> Text:
        """As many of the first files as `limit_bytes` reaches into."""
        ends = accumulate(len(document.encode()) for document in self.documents)
        count = 1 + sum(end < limit_bytes for end in ends)
        name = f"package {self.name} {self.version} (sha256 {self.sha256})"
        return Text(self.documents[:count], count >= len(self.documents), name)


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences and how alike people found them."""

    first: str
    second: str
    score: float


def read_text(source: str, limit_bytes: int) -> Text:
    """The text of a source, of its first `limit_bytes` at most.

    Args:
        source: A text file, a JSONL file of `{"text": ...}` or of `{"messages": [...]}` (also `conversations`), a directory of such
            files (recursively, sorted), or `package:NAME`.
        limit_bytes: Where reading stops; text is cut there, a JSONL line is not.

    Raises:
        InputError: There is no text, or what is there cannot be read as UTF-8 text.
    """
    if source.startswith(PACKAGE):
        package = read_package(source.removeprefix(PACKAGE))
        return package.text(limit_bytes)
    files = _files(source)
    documents: list[str | Conversation] = []
    left, complete = limit_bytes, True
    for file in files:
        read = _read_jsonl if file.suffix == ".jsonl" else _read_plain
        try:
            found, size, whole = read(file, left)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from None
        documents += found
        left -= size
        if not whole or left <= 0:
            complete = whole and file == files[-1]
            break
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        raise InputError(f"{source} holds no text: it is empty or all white space")
    return Text(tuple(documents), complete, source)


def read_pairs(source: str) -> list[ScoredPair]:
    """The rows of a CSV file with the columns sentence1, sentence2 and score, in any order if the first row names them.

    Raises:
        InputError: A row or a column is missing or malformed; the message names the line.
    """
    path = existing_path(source)
    if path is None or not path.is_file():
        raise InputError(f"pairs {source!r} do not exist; expected a CSV file with the columns {','.join(_PAIR_COLUMNS)}")
    try:
        (text,), _, whole = _read_plain(path, _CSV_LIMIT)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not whole:
        raise InputError(f"{path} is larger than {_CSV_LIMIT} bytes; give fewer pairs")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    pairs: list[ScoredPair] = []
    columns: tuple[str, ...] = _PAIR_COLUMNS
    try:
        for row in rows:
            names = tuple(cell.strip().lower() for cell in row)
            if not pairs and {"sentence1", "sentence2"} & set(names):
                columns = names
                if missing := [name for name in _PAIR_COLUMNS if name not in columns]:
                    raise InputError(f"{path} has no column {missing[0]!r}; expected {','.join(_PAIR_COLUMNS)}")
            elif row:
                pairs.append(_pair(row, columns, f"{path}, line {rows.line_num}"))
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}") from None
    if not pairs:
        raise InputError(f"{path} holds no pairs; expected rows of {','.join(_PAIR_COLUMNS)}")
    return pairs


def read_package(name: str) -> PackageText:
    """The .py files of an installed distribution, without vendored ones and those that are no UTF-8.

    Raises:
        InputError: It is not installed, or its files are not on disk.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise InputError(f"package {name!r} is not installed; install it, or give another text") from None
    root, found = str(distribution.locate_file("")), []
    for file in sorted(map(str, distribution.files or ())):
        if file.endswith(".py") and {"_vendor", ".."}.isdisjoint(file.split("/")):
            path = Path(root, file)
            with suppress(OSError):  # not on disk
                stat = path.stat()
                found.append((file, path, stat.st_size, stat.st_mtime_ns))
    digest, documents = _package(tuple(found))
    if not any(document.strip() for document in documents):
        raise InputError(f"package {name!r} lists no Python source files (an editable install lists none); give another text")
    return PackageText(distribution.metadata["Name"], distribution.version, digest, documents)


def installed(name: str) -> str | None:
    """What changes when a distribution is installed anew: the list of its files with their digests; None where there is none."""
    try:
        return importlib.metadata.distribution(name).read_text("RECORD")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


@lru_cache(2)  # a few MB, which every job of a bundled model asks for
def _package(files: tuple[tuple[str, Path, int, int], ...]) -> tuple[str, tuple[str, ...]]:
    """Digest and contents of files, given by name, place, size and time of the last change."""
    digest = hashlib.sha256()
    documents = []
    for name, path, _, _ in files:
        data = path.read_bytes()
        try:
            documents.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            continue
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest(), tuple(documents)


def _files(source: str) -> list[Path]:
    path = existing_path(source)
    if path is not None and path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"{source} holds no text; expected files that end in {', '.join(SUFFIXES)}")
        return files
    if path is not None and path.is_file():
        if path.suffix == ".csv":
            raise InputError(f"{source} is a CSV file of scored pairs, which only encoders read; give plain text")
        return [path]
    raise InputError(f"text {source!r} does not exist; expected a file, a directory, or package:NAME of an installed package")


def _read_plain(file: Path, limit_bytes: int) -> tuple[list[str], int, bool]:
    """Contents, bytes read, and whether that was all. A byte order mark is dropped."""
    with file.open("rb") as handle:
        data = handle.read(limit_bytes + 1)
    whole = len(data) <= limit_bytes
    data = data[:limit_bytes]
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise InputError(f"{file} is not UTF-8 text: {byte}; convert it to UTF-8") from None
    return [text], len(data), whole


def _read_jsonl(file: Path, limit_bytes: int) -> tuple[list[str | Conversation], int, bool]:
    documents: list[str | Conversation] = []
    size = 0
    with file.open("rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(_LINE_LIMIT), b""), start=1):
            if line.strip():
                documents.append(_jsonl_document(line, f"{file}, line {number}"))
            size += len(line)
            if size >= limit_bytes:
                return documents, size, not handle.read(1)
    return documents, size, True


def _jsonl_document(line: bytes, where: str) -> str | Conversation:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {str(error)[:120]}") from None
    row = value if isinstance(value, dict) else {}
    found = [key for key in ("text", *CHAT_COLUMNS) if row.get(key) is not None]
    if len(found) > 1:
        raise InputError(f"{where} has both {found[0]!r} and {found[1]!r}; keep the one that is to be read")
    if found and found[0] in CHAT_COLUMNS:
        return conversation(row[found[0]], where)
    if not isinstance(row.get("text"), str):
        raise InputError(f'{where} has no string under "text"; expected {{"text": "..."}} or {{"messages": [...]}} on every line')
    return str(row["text"])


def _pair(row: list[str], columns: tuple[str, ...], where: str) -> ScoredPair:
    if len(row) != len(columns):
        raise InputError(f"{where} has {len(row)} columns; expected {','.join(columns)}")
    cells = dict(zip(columns, row, strict=True))
    try:
        score = float(cells["score"])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{where}: the score {cells['score'][:40]!r} is no finite number; expected the columns {','.join(columns)}")
    return ScoredPair(cells["sentence1"], cells["sentence2"], score)
