"""Sources of text: each form is read as it stands, and each defect is named."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from autoeff.errors import InputError
from autoeff.evaluators.sources import ScoredPair, read_package, read_pairs, read_text

ALL = 1 << 20


def test_file_is_read_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("é\r\n<|endoftext|>\n  x".encode())
    text = read_text(str(file), ALL)
    assert (text.documents, text.complete, text.name) == (("é\r\n<|endoftext|>\n  x",), True, str(file))


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(str(tmp_path / "a.txt"), ALL).documents == ("abc",)


def test_directory_is_read_recursively_in_order_without_other_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, content in {
        "z.md": "last",
        "b/x.py": "second",
        "a.txt": "first",
        "b/image.png": "no",
        "b/y.jsonl": '{"text": "third"}\n',
    }.items():
        (tmp_path / name).write_text(content)
    assert read_text(str(tmp_path), ALL).documents == ("first", "second", "third", "last")


def test_jsonl_gives_one_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\ntwo", "id": 3}\n\n{"text": "three"}')
    assert read_text(str(file), ALL).documents == ("one\ntwo", "three")


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_reading_stops_at_the_limit_between_characters(tmp_path: Path, limit: int) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("aéb".encode())
    text = read_text(str(file), limit)
    assert text.documents[0] == "aéb"[: len("aéb".encode()[:limit].decode(errors="ignore"))]
    assert text.complete == (limit >= 4)


def test_reading_stops_between_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    sizes = {5: (("12345",), False), 6: (("12345", "x"), False), 20: (("12345", "x", "y"), True), 99: (("12345", "x", "y"), True)}
    for limit, (documents, complete) in sizes.items():
        text = read_text(str(tmp_path), limit)
        assert (text.documents, text.complete) == (documents, complete)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"abc\xff\xfe", "not UTF-8 text: byte 0xff at 3"),
        ("a.txt", b"abc\xc3", "not UTF-8 text: byte 0xc3 at 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', 'line 3 has no string under "text"'),
        ("a.jsonl", b"[1]\n", "line 1 has no string"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
        ("a.csv", b"a,b,1\n", "which only encoders read"),
    ],
)
def test_defect_of_a_text_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_text(str(tmp_path / name), ALL)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_source_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected a file, a directory, or package:NAME"):
        read_text(str(tmp_path / "nothing"), ALL)
    with pytest.raises(InputError, match="expected files that end in"):
        read_text(str(tmp_path), ALL)


def test_pairs_are_read_with_and_without_header(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    expected = [ScoredPair("a, b", "c", 4.5), ScoredPair('d "e"', "f\ng", 0.0)]
    rows = '"a, b",c,4.5\n"d ""e""","f\ng",0\n'
    file.write_text(rows)
    assert read_pairs(str(file)) == expected
    file.write_text("sentence1,sentence2,score\n" + rows)
    assert read_pairs(str(file)) == expected
    file.write_text("Score,id,Sentence2,Sentence1\r\n1.5,7,y,x\r\n")
    assert read_pairs(str(file)) == [ScoredPair("x", "y", 1.5)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sentence1,sentence2\na,b\n", "no column 'score'"),
        ("a,b\n", "line 1 has 2 columns"),
        ("sentence1,sentence2,score\na,b,1\nc,d\n", "line 3 has 2 columns"),
        ("a,b,high\n", "line 1: the score 'high' is no finite number"),
        ("a,b,nan\n", "no finite number"),
        ("sentence1,sentence2,score\n", "holds no pairs"),
        ("", "holds no pairs"),
        ('a,"b,1\n', "line 1: "),
        ("a," + "b" * 200_000 + ",1\n", "line 1: field larger"),
    ],
)
def test_defect_of_pairs_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError) as caught:
        read_pairs(str(tmp_path / "a.csv"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_package_is_its_source_files_in_order() -> None:
    package = read_package("pytest-timeout")
    assert package.version == importlib.metadata.version("pytest-timeout")
    assert any("def pytest_addoption" in document for document in package.documents)
    assert read_text("package:pytest-timeout", ALL).documents == package.documents
    assert read_text("package:pytest-timeout", ALL).name == f"package pytest-timeout {package.version} (sha256 {package.sha256})"
    assert read_package("pytest-timeout").sha256 == package.sha256


def fake_distribution(folder: Path, files: dict[str, bytes]) -> None:
    info = folder / "fake-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Fake\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_package_leaves_out_vendored_binary_and_outside_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    files = {"fake/b.py": b"b", "fake/a.py": b"a", "fake/_vendor/c.py": b"c", "fake/d.so": b"d", "fake/e.py": b"\xff", "../bin/f.py": b"f"}
    fake_distribution(tmp_path / "site", files)
    monkeypatch.syspath_prepend(tmp_path / "site")
    package = read_package("fake")
    assert (package.name, package.version, package.documents) == ("Fake", "1.0", ("a", "b"))
    assert [(len(package.text(limit).documents), package.text(limit).complete) for limit in (1, 2, 9)] == [(1, False), (2, True), (2, True)]
    (tmp_path / "site" / "fake" / "a.py").write_bytes(b"changed")
    assert read_package("fake").sha256 != package.sha256


def test_package_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_distribution(tmp_path, {"fake.pth": b"/somewhere"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="lists no Python source files"):
        read_package("fake")


@pytest.mark.parametrize("name", ["no-such-package-at-all", ""])
def test_package_that_is_not_installed_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not installed"):
        read_package(name)
