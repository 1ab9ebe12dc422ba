"""Columns of parquet and arrow files: exactly the rows, as many as needed, and each defect in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from autoeff.errors import InputError
from autoeff.evaluators.dataset import is_dataset, read_dataset
from autoeff.evaluators.loading import inspect_model, load_tokenizer
from autoeff.evaluators.setup import TextSpec
from autoeff.evaluators.text import make_windows

ALL = 1 << 20
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def parquet(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def refusal(source: str) -> str:
    """The one line that says why it is not read."""
    with pytest.raises(InputError) as caught:
        read_dataset(source, ALL)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_column_of_a_file_gives_one_document_a_row(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", title=["x", "y", "z"], body=["one\ntwo", None, "é"], n=[1, 2, 3])
    text = read_dataset(f"{file}#body", ALL)
    assert (text.documents, text.complete, text.name) == (("one\ntwo", "é"), True, f"{file}#body")


def test_arrow_file_of_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert read_dataset(str(tmp_path / "saved"), ALL).documents == ("a", "b")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert read_dataset(f"{file}#text", ALL).documents == ("a", "b")


def test_directory_is_read_recursively_in_order(tmp_path: Path) -> None:
    parquet(tmp_path / "b" / "0.parquet", text=["third"])
    parquet(tmp_path / "a" / "1.parquet", text=["second"])
    parquet(tmp_path / "a" / "0.parquet", text=["first"])
    assert read_dataset(str(tmp_path), ALL).documents == ("first", "second", "third")


@pytest.mark.parametrize(("limit", "rows", "complete"), [(1, 1, False), (4, 1, False), (5, 2, False), (12, 3, True), (13, 3, True)])
def test_reading_stops_behind_the_row_that_reaches_the_limit(tmp_path: Path, limit: int, rows: int, complete: bool) -> None:
    file = parquet(tmp_path / "a.parquet", text=["éé", "bbbb", "cccc"])
    text = read_dataset(str(file), limit)
    assert (len(text.documents), text.complete) == (rows, complete)


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"text": ["a"], "title": ["b"]}, "text"),
        ({"body": ["a"], "n": [1]}, "body"),
        ({"messages": [TALK], "prompt": ["b"]}, "messages"),
        ({"conversations": [TALK], "id": ["b"]}, "conversations"),
    ],
)
def test_usual_column_is_found_and_named(tmp_path: Path, columns: dict[str, list[Any]], column: str) -> None:
    file = parquet(tmp_path / "a.parquet", **columns)
    assert read_dataset(str(file), ALL).name == f"{file}#{column}"


def test_column_of_conversations_is_read_as_such(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", messages=[TALK])
    assert read_dataset(str(file), ALL).documents == ((("user", "hi"), ("assistant", "yes")),)


def test_column_that_cannot_be_guessed_or_is_unknown_lists_those_there_are(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", title=["a"], body=["b"], n=[1])
    both = parquet(tmp_path / "b.parquet", text=["a"], messages=[TALK])
    for source, says in {
        str(file): f"{file} does not say which column is the text; write {file}#COLUMN, where COLUMN is one of title, body, n",
        f"{file}#text": f"{file} has no column 'text'; it has title, body, n",
        f"{file}#n": "#n, row 0 is no conversation: .* found int",
        str(both): "does not say which column",
    }.items():
        assert re.search(says, refusal(source))


def test_damaged_empty_and_mixed_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    assert "bad.parquet cannot be read: " in refusal(str(tmp_path / "bad.parquet"))
    empty = parquet(tmp_path / "empty.parquet", text=[None, None])
    assert "empty.parquet#text holds no text" in refusal(f"{empty}#text")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert "holds arrow and parquet files; give those of one format" in refusal(str(tmp_path))


def test_what_is_a_data_set(tmp_path: Path) -> None:
    file = parquet(tmp_path / "tables" / "a.parquet", text=["a"])
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("x")
    (tmp_path / "with#mark.txt").write_text("x")
    yes = ["hub:a/b", str(file), f"{file}#text", str(file.parent), f"{file.parent}#text"]
    no = ["package:rich", str(tmp_path / "plain"), str(tmp_path / "with#mark.txt"), str(tmp_path / "plain" / "a.txt"), "absent.parquet"]
    assert [is_dataset(source) for source in yes + no] == [True] * len(yes) + [False] * len(no)
    (file.parent / "readme.md").write_text("about the tables")
    assert [is_dataset(str(file.parent)), is_dataset(f"{file.parent}#text")] == [False, True]


def test_windows_are_those_of_the_same_text_in_a_file(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    facts = inspect_model(tiny_models["llama"])
    pieces = ["the cat sat on the mat " * 20, "the dog ate the other hat " * 20]
    (tmp_path / "a.txt").write_text("\n\n".join(pieces))
    file = parquet(tmp_path / "a.parquet", text=pieces)
    found = [make_windows(load_tokenizer(facts), facts, TextSpec(str(source), 5, 16), 3, "search") for source in (tmp_path / "a.txt", file)]
    assert found[0].digest == found[1].digest
    assert found[1].source == f"{file}#text"


def test_missing_extra_names_the_command(tmp_path: Path) -> None:
    """In a process in which `datasets` cannot be imported."""
    file = parquet(tmp_path / "a.parquet", text=["a"])
    code = """
import sys
sys.modules["datasets"] = None
from autoeff.errors import InputError
from autoeff.evaluators.dataset import read_dataset
try:
    read_dataset(sys.argv[1], 9)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "parquet, arrow and hub: text need the package datasets; run `pip install 'autoeff[hub]'`\n"
