"""The links in `autoeff/`, and what a wheel and an sdist built from them hold and do outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import autoeff

ROOMS = ("api", "dashboard", "evaluators", "kernels", "search", "spaces")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(root: Path) -> list[str]:
    """Files of the checkout as git sees them: committed ones and new ones that it does not ignore."""
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    listed = run("git", "-c", f"safe.directory={root}", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root)
    return sorted(name for name in listed.split("\0") if name and (root / name).exists())


@dataclass(frozen=True)
class Built:
    """A wheel built from the sources, an sdist of them, and a wheel built from that sdist.

    Attributes:
        files: What the package was to hold, as named inside it.
    """

    files: set[str]
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built in a copy, so that neither the checkout nor an earlier build in it takes part."""
    copy = tmp_path_factory.mktemp("checkout")
    names = tracked(root)
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy / name, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    run(*build, copy / "both", copy, cwd=copy)
    run(*build, copy / "direct", "--wheel", copy, cwd=copy)
    (sdist,) = (copy / "both").glob("*.tar.gz")
    (wheel_of_sdist,) = (copy / "both").glob("*.whl")
    (wheel,) = (copy / "direct").glob("*.whl")
    return Built(in_package(names), wheel, sdist, wheel_of_sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the wheel was installed into, away from the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target")
    run(*pip, folder / "site", built.wheel_of_sdist, cwd=folder)
    return folder / "site"


def in_package(names: list[str]) -> set[str]:
    """What these files of the checkout are called inside the package."""
    own = {name for name in names if name.startswith("autoeff/") and name.removeprefix("autoeff/") not in ROOMS}
    return own | {f"autoeff/{name}" for name in names if name.split("/")[0] in ROOMS}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_package_links_to_every_room(root: Path) -> None:
    links = {path.name: str(path.readlink()) for path in (root / "autoeff").iterdir() if path.is_symlink()}
    assert links == {room: f"../{room}" for room in ROOMS}


def test_rooms_are_real_folders(root: Path) -> None:
    assert [room for room in ROOMS if not (root / room).is_dir() or (root / room).is_symlink()] == []


def test_wheel_holds_every_file_of_the_rooms(built: Built) -> None:
    shipped = {name for name in contents(built.wheel) if name.startswith("autoeff/")}
    assert shipped == built.files


def test_sdist_holds_real_files(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert [member.name for member in members if not member.isfile()] == []
    names = {member.name.partition("/")[2] for member in members}
    assert {name for name in names if name.startswith("autoeff/")} == built.files
    assert {"CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"} <= names


def test_wheel_of_the_sdist_equals_the_wheel(built: Built) -> None:
    ours, theirs = contents(built.wheel), contents(built.wheel_of_sdist)
    assert {n for n in ours if not n.endswith("/RECORD")} == {n for n in theirs if not n.endswith("/RECORD")}
    assert [name for name in ours if name.startswith("autoeff/") and ours[name] != theirs[name]] == []


def test_wheel_carries_version_licence_and_command(built: Built, root: Path) -> None:
    held = contents(built.wheel)
    info = f"autoeff-{autoeff.__version__}.dist-info"
    assert held[f"{info}/licenses/LICENSE"] == (root / "LICENSE").read_bytes()
    assert b"autoeff = autoeff.cli:main" in held[f"{info}/entry_points.txt"]
    assert f"Version: {autoeff.__version__}\n".encode() in held[f"{info}/METADATA"]


def test_installed_wheel_has_its_rooms_and_knobs(installed: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, pathlib, autoeff
from autoeff.spaces.knob import known_knobs

for room in {ROOMS}:
    module = importlib.import_module("autoeff." + room)
    assert all(pathlib.Path(p).is_relative_to({str(installed)!r}) for p in module.__path__), (room, list(module.__path__))
print(autoeff.__version__, *sorted(known_knobs()))
"""
    version, *knobs = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert version == autoeff.__version__
    assert {"bits", "skip"} <= set(knobs)


def test_installed_wheel_finds_the_bundled_model(installed: Path) -> None:
    demo = installed / "autoeff" / "models" / "demo"
    assert {"README.md", "config.json", "model.safetensors", "texts.json", "tokenizer.json"} <= {path.name for path in demo.iterdir()}


def test_installed_wheel_runs_the_command(installed: Path, tmp_path: Path) -> None:
    said = run(sys.executable, "-m", "autoeff.cli", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert autoeff.__version__ in said


def test_constraints_pin_what_torch_needs_and_name_no_registry(root: Path) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line for line in lines)
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "triton"} <= pins.keys()
    assert not {"pip", "setuptools", "uv", "autoeff"} & pins.keys()
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])


def test_every_direct_dependency_is_pinned(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(item for group in project["optional-dependencies"].values() for item in group)]
    pinned = {line.split("==")[0] for line in (root / "constraints.txt").read_text().splitlines()}
    unpinned = {item.split(">")[0].split("<")[0].split(";")[0].split("[")[0].strip() for item in wanted} - pinned
    assert unpinned == {"setuptools"}
