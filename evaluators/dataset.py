"""Text of data sets: a column of parquet or arrow files, or of a data set of the hub, read with the package `datasets` (extra `hub`).

Data sets are data, never code: those that bring a script are refused, and only formats that hold plain values are read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoeff.errors import InputError
from autoeff.evaluators.chat import CHAT_COLUMNS, Conversation, conversation
from autoeff.evaluators.checkpoint import existing_path
from autoeff.evaluators.hub import refused_by_hub
from autoeff.evaluators.sources import SUFFIXES, Text

__all__ = ["HUB", "is_dataset", "read_dataset"]

HUB = "hub:"
_TABLES = {".arrow": "arrow", ".parquet": "parquet"}
_FORM = "hub:OWNER/NAME[:CONFIG][:SPLIT][#COLUMN]"
_REFERENCE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?::(?P<first>[^:#]*))?(?::(?P<second>[^:#]*))?(?:#(?P<column>.+))?")
_FORMATS = ("arrow", "csv", "json", "parquet", "text")  # others hold pictures, archives or pickles
_USUAL_COLUMNS = ("text", *CHAT_COLUMNS)
_SHOWN = 20
_REASON = 200


def is_dataset(source: str) -> bool:
    """Whether `read_dataset` reads the source: `hub:…`, a parquet or arrow file, or a directory of them; all with `#COLUMN` or without.

    A directory that holds text files too is one only with a column.
    """
    if source.startswith(HUB):
        return True
    path, column = _split(source)
    if path is None or not path.is_dir():
        return path is not None and path.suffix in _TABLES
    return bool(_tables(path)) and (column is not None or not any(p.suffix in SUFFIXES for p in path.rglob("*")))


def read_dataset(source: str, limit_bytes: int) -> Text:
    """A column of a data set; of a remote one as few rows are fetched as the limit needs.

    Args:
        source: `FILE[#COLUMN]`, `DIRECTORY[#COLUMN]` (recursively, sorted) or `hub:OWNER/NAME[:CONFIG][:SPLIT][#COLUMN]`. A single
            part behind the name is a configuration if there is one of that name, else a split. What is left out is: the
            configuration `default`, or the only one; the split `train`, or the only one; the one column of text, messages and
            conversations that there is, or the only one that holds text.
        limit_bytes: Where reading stops, behind the row that reaches it.

    Raises:
        InputError: The extra is not installed; something cannot be read, is unknown or not to be guessed; the hub does not give
            the data set, or it is one of code.
    """
    return _read_hub(source, limit_bytes) if source.startswith(HUB) else _read_files(source, limit_bytes)


def _split(source: str) -> tuple[Path | None, str | None]:
    """The path, if there is one, and the column."""
    name, mark, column = source.rpartition("#")
    if existing_path(source) is not None or not mark:
        return existing_path(source), None
    return existing_path(name), column


def _tables(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in _TABLES and p.is_file())


def _read_files(source: str, limit_bytes: int) -> Text:
    path, column = _split(source)
    assert path is not None
    files = _tables(path) if path.is_dir() else [path]
    formats = {_TABLES[file.suffix] for file in files}
    if len(formats) > 1:
        raise InputError(f"{path} holds {' and '.join(sorted(formats))} files; give those of one format")
    datasets = _datasets()
    with _refusals(str(path)):
        rows = datasets.load_dataset(formats.pop(), data_files={"train": [str(f) for f in files]}, split="train", streaming=True)
    return _read(rows, column, str(path), limit_bytes)


def _read_hub(source: str, limit_bytes: int) -> Text:
    if (match := _REFERENCE.fullmatch(source)) is None:
        raise InputError(f"cannot read the text {source!r}; write {_FORM}")
    name, parts = match["name"], [part for part in (match["first"], match["second"]) if part]
    what = f"dataset {name!r}"
    datasets = _datasets()
    revision = _revision(name)
    with _refusals(what, name):
        configs = datasets.get_dataset_config_names(name, revision=revision)
    if len(parts) == 2 or (parts and parts[0] in configs):
        config = _one_of(parts.pop(0), configs, "configuration", what)
    else:
        config = _usual(configs, "default", "configuration", what)
    with _refusals(what, name):
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        kind = type(builder).__module__.split(".")
        if kind[:2] != ["datasets", "packaged_modules"] or kind[2] not in _FORMATS:
            raise InputError(f"{what} is no table of text but {kind[-1]}; read are {', '.join(_FORMATS)}")
        splits = builder.as_streaming_dataset()
    split = _one_of(parts[0], splits, "split", what) if parts else _usual(list(splits), "train", "split", what)
    text = _read(splits[split], match["column"], f"{HUB}{name}:{config}:{split}", limit_bytes, name)
    return replace(text, name=f"{text.name} at {revision[:12]}")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError("parquet, arrow and hub: text need the package datasets; run `pip install 'autoeff[hub]'`") from None
    datasets.disable_progress_bars()
    return datasets


def _revision(name: str) -> str:
    """The commit that `main` is at, if it may be read."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.auth_check(name, repo_type="dataset")
        return str(api.dataset_info(name).sha)
    except Exception as error:  # the client lets the errors of several HTTP libraries through
        raise refused_by_hub("dataset", name, error) from None


def _read(rows: Any, column: str | None, name: str, limit_bytes: int, hub_name: str | None = None) -> Text:
    documents: list[str | Conversation] = []
    size, complete = 0, True
    with _refusals(name, hub_name):
        features: Any = rows.features or next(iter(rows), {})  # JSON and CSV show their columns with the first row
        column = _column(features, column, name)
        iterator: Iterator[Any] = iter(rows.select_columns([column]))
        for number, row in enumerate(iterator):
            value = row[column]
            if value is None:
                continue
            document = value if isinstance(value, str) else conversation(value, f"{name}#{column}, row {number}")
            documents.append(document)
            size += len(document.encode()) if isinstance(document, str) else sum(len(said.encode()) for _, said in document)
            if size >= limit_bytes:
                complete = next(iterator, None) is None
                break
    if not documents:
        raise InputError(f"{name}#{column} holds no text: there are no rows, or all are null")
    return Text(tuple(documents), complete, f"{name}#{column}")


def _column(features: Any, column: str | None, name: str) -> str:
    shown = ", ".join([*features][:_SHOWN]) or "none"
    if column is not None:
        if column not in features:
            raise InputError(f"{name} has no column {column!r}; it has {shown}")
        return column
    usual = [key for key in _USUAL_COLUMNS if key in features]
    text = [key for key, value in features.items() if isinstance(value, str) or getattr(value, "dtype", "") in ("string", "large_string")]
    found = usual or text  # text beside messages is ambiguous too
    if len(found) != 1:
        raise InputError(f"{name} does not say which column is the text; write {name}#COLUMN, where COLUMN is one of {shown}")
    return found[0]


def _one_of(part: str, known: Iterable[str], what: str, name: str) -> str:
    names = list(known)
    if part not in names:
        raise InputError(f"{name} has no {what} {part!r}; it has {', '.join(names[:_SHOWN])}")
    return part


def _usual(names: list[str], usual: str, what: str, name: str) -> str:
    if usual in names:
        return usual
    if len(names) != 1:
        raise InputError(f"{name} has several {what}s: name one of {', '.join(names[:_SHOWN])} as in {_FORM}")
    return names[0]


@contextmanager
def _refusals(what: str, hub_name: str | None = None) -> Iterator[None]:
    """Turns what reading raises into one line; the formats have errors of many libraries, and no common base."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_REASON]
        if "scripts are no longer supported" in reason:
            raise InputError(f"{what} is made by a script, and data are never code here; give one that holds its rows as files") from None
        if hub_name is not None and sys.modules["huggingface_hub.errors"].HfHubHTTPError in {type(error), *type(error).__mro__}:
            raise refused_by_hub("dataset", hub_name, error) from None
        raise InputError(f"{what} cannot be read: {reason}") from None
