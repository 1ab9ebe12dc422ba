"""The hub, against a server that answers as it does: what it gives is read, and each refusal is one line with the remedy.

`HF_ENDPOINT` is read when the client is imported, so that the client runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "absent": (404, "RepoNotFound"), "token": (401, None),
            "forbidden": (403, None), "broken": (500, None)}  # fmt: skip
ASK = """
import json, sys
from autoeff.errors import InputError
from autoeff.evaluators.dataset import read_dataset
from autoeff.evaluators.loading import resolve_model

for kind, name, limit in json.loads(sys.argv[1]):
    try:
        if kind == "model":
            print(json.dumps(sorted(path.name for path in resolve_model(name).iterdir())))
        else:
            text = read_dataset(name, limit)
            print(json.dumps([text.documents, text.complete, text.name]))
    except InputError as error:
        assert error.exit_code == 2
        print(json.dumps(f"refused: {error}"))
"""


class Hub(ThreadingHTTPServer):
    """Repositories below `folder`: `models/OWNER/NAME` and `datasets/OWNER/NAME`; names of `REFUSALS` are refused."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        for name, (status, code) in REFUSALS.items():
            if f"own/{name}" in path:
                return self._send(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": "no"} if code else {})
        return self._api(path.split("/")[1:]) if path.startswith("api/") else self._file(path.split("/"))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("paths", [])
        kind, owner, name = self.path.split("/")[2:5]
        folder = self.server.folder / kind / owner / name
        self._json([entry for entry in _entries(folder, folder, deep=True) if entry["path"] in paths])

    def _api(self, parts: list[str]) -> None:
        if len(parts) < 3:  # who am I, what is allowed
            return self._send(401, b"{}", {})
        kind, owner, name, *rest = parts
        folder = self.server.folder / kind / owner / name
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["auth-check"]:
            return self._json({})
        if rest[:1] == ["tree"]:
            return self._json(_entries(folder, folder.joinpath(*rest[2:]), deep="recursive=True" in self.path))
        return self._json(
            {"id": f"{owner}/{name}", "sha": SHA, "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0,
             "siblings": [{"rfilename": entry["path"]} for entry in _entries(folder, folder, deep=True) if entry["type"] == "file"]}
        )  # fmt: skip

    def _file(self, parts: list[str]) -> None:
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        owner, name, _, _, *inside = parts
        file = self.server.folder.joinpath(kind, owner, name, *inside)
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if (asked := self.headers.get("Range")) is None:
            return self._send(200, data, headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
        return self._send(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stays quiet."""


def _entries(folder: Path, inside: Path, *, deep: bool) -> list[dict[str, Any]]:
    """Files and folders below `inside`, as the hub lists them."""
    entries = []
    for path in sorted(inside.rglob("*") if deep else inside.iterdir() if inside.is_dir() else ()):
        oid = hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()
        kind: dict[str, Any] = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
        entries.append(kind | {"path": path.relative_to(folder).as_posix(), "oid": oid})
    return entries


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with Hub(tmp_path / "hub") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(folder: Path, endpoint: str, *questions: tuple[str, str, int], **environment: str) -> list[Any]:
    """What a process answers whose hub is at `endpoint` and whose cache is empty."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env=inherited | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"} | environment,
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert all("\n" not in answer for answer in answers if isinstance(answer, str))
    return answers


def test_model_is_fetched_as_data_alone(hub: Hub, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = hub.folder / "models" / "own" / "good"
    shutil.copytree(tiny_models["llama"], folder)
    for name in ("pytorch_model.bin", "modeling_own.py", "chat_template.jinja"):
        (folder / name).write_text("x")
    (pickled := hub.folder / "models" / "own" / "pickled").mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_text("x")
    names, refused = ask(tmp_path, hub.url, ("model", "own/good", 0), ("model", "own/pickled", 0))
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert not [path for path in hub.asked if "/resolve/" in path and path.endswith((".bin", ".py"))]
    assert "model 'own/pickled' has no safetensors on the hub; other weights are never loaded" in refused


def test_each_refusal_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    names = list(REFUSALS)
    answers = ask(
        tmp_path, hub.url, *[(kind, prefix + f"own/{name}", 9) for kind, prefix in (("model", ""), ("text", "hub:")) for name in names]
    )
    for kind, folder, found in (("model", "", answers[: len(names)]), ("dataset", "datasets/", answers[len(names) :])):
        says = dict(zip(names, found, strict=True))
        where = f"{hub.url}/{folder}own/gated"
        assert (
            says["gated"] == f"refused: {kind} 'own/gated' is gated: accept its terms at {where}, then set HF_TOKEN or run `hf auth login`"
        )
        for name in ("private", "absent"):
            assert f"{kind} 'own/{name}' is not on the hub, or it is private" in says[name]
            assert "set HF_TOKEN" in says[name]
        for name, status in (("token", 401), ("forbidden", 403)):
            assert f"the hub refuses {kind} 'own/{name}' ({status}): set HF_TOKEN" in says[name]
        assert f"the hub fails over {kind} 'own/broken' (500 Internal Server Error); try again, or give a local" in says["broken"]


def test_offline_and_unreachable_hub_are_told_apart(tmp_path: Path) -> None:
    questions = [("model", "own/good", 0), ("text", "hub:own/good", 9)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound and not listening: refused
        for answer, local in zip(ask(tmp_path, nowhere, *questions), ("directory", "file"), strict=True):
            assert f"is not at hand and {nowhere} cannot be reached" in answer
            assert f"give a local {local}" in answer
        for answer in ask(tmp_path, nowhere, *questions, HF_HUB_OFFLINE="1"):
            assert "is not at hand and HF_HUB_OFFLINE forbids asking the hub; unset it" in answer


@pytest.fixture
def texts(hub: Hub) -> Hub:
    """Data sets: of two configurations, of one file, of code, of pictures."""
    own = hub.folder / "datasets" / "own"
    for config, split in (("big", "train-0"), ("big", "train-1"), ("big", "test-0"), ("small", "train-0")):
        rows = [f"{config} {split} {i} " + "x" * 1000 for i in range(60)]
        file = own / "books" / config / f"{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"body": rows, "n": list(range(len(rows)))}).to_parquet(file)
    configs = [
        {"config_name": "big", "data_files": [{"split": "train", "path": "big/train-*"}, {"split": "test", "path": "big/test-*"}]},
        {"config_name": "small", "data_files": "small/*"},
    ]
    (own / "books" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    (own / "plain").mkdir()
    (own / "plain" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (own / "code").mkdir()
    (own / "code" / "code.py").write_text("raise SystemExit('was run')")
    (own / "pictures" / "train").mkdir(parents=True)
    (own / "pictures" / "train" / "a.png").write_bytes(b"x")
    return hub


def test_data_sets_are_read_by_configuration_split_and_column_from_their_start(texts: Hub, tmp_path: Path) -> None:
    questions = [
        ("hub:own/plain", 99), ("hub:own/books:small", 99_999), ("hub:own/books:big:test#body", 1),
        ("hub:own/books:big", 50_000), ("hub:own/books", 9),
        ("hub:own/books:tiny:train", 9), ("hub:own/books:big:valid", 9), ("hub:own/books:small#title", 9), ("hub:own/code", 9),
        ("hub:own/pictures", 9), ("hub:books", 9), ("hub:own/plain:test", 9),
    ]  # fmt: skip
    answers = ask(tmp_path, texts.url, *[("text", name, limit) for name, limit in questions])
    plain, small, big, start, *refused = answers
    assert plain == [["a", "b"], True, f"hub:own/plain:default:train#text at {SHA[:12]}"]
    assert [row.rstrip("x") for row in small[0]] == [f"small train-0 {i} " for i in range(60)]
    assert small[1:] == [True, f"hub:own/books:small:train#body at {SHA[:12]}"]
    assert (len(big[0]), big[0][0][:11], big[1]) == (1, "big test-0 ", False)
    assert (len(start[0]), start[1]) == (50, False)
    assert any("train-0.parquet" in path for path in texts.asked)
    assert not any("train-1.parquet" in path for path in texts.asked)  # the limit lies before it
    for answer, says in zip(
        refused,
        [
            "dataset 'own/books' has several configurations: name one of big, small as in hub:OWNER/NAME[:CONFIG][:SPLIT][#COLUMN]",
            "dataset 'own/books' has no configuration 'tiny'; it has big, small",
            "dataset 'own/books' has no split 'valid'; it has train, test",
            "hub:own/books:small:train has no column 'title'; it has body, n",
            "dataset 'own/code' is made by a script, and data are never code here",
            "dataset 'own/pictures' is no table of text but imagefolder; read are arrow, csv, json, parquet, text",
            "cannot read the text 'hub:books'; write hub:OWNER/NAME",
            "dataset 'own/plain' has no split 'test'; it has train",
        ],
        strict=True,
    ):
        assert answer.startswith(f"refused: {says}"), (answer, says)
