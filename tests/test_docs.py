"""The documentation is true: it builds, its links lead somewhere, its commands and examples run, its reference is complete.

A fenced block under `<!-- run -->` is executed, all of them in one working directory and in the order of the pages. Searches take
their fast form: the least budget, two short windows of a small text, two widths. In a `console` block the lines under a `$` command are
looked for in what it prints, `…` standing for anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer
from pydantic import BaseModel

from autoeff.cli import app, main
from autoeff.flags import FIELDS
from autoeff.search.job import JobSpec
from autoeff.search.run import plan
from autoeff.search.settings import Settings
from autoeff.spaces.couplings import coupled
from autoeff.spaces.criterion import known_criteria
from autoeff.spaces.knob import known_knobs, make_knob
from autoeff.spaces.plugins import plugins
from autoeff.spaces.quantizer import known_quantizers
from autoeff.spaces.sites import find_structure

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ORDER = ("index", "limits", "runtimes", "troubleshooting")
"""Pages whose marked blocks are run; what one leaves behind the next may use."""
TINY = {"source": "train.txt", "windows": 2, "length": 32}
FAST: dict[str, Any] = {"data": TINY, "eval_data": TINY, "space": {"levels": {"*:bits": [16, 2]}}}
WORDS = "the cat sat on the mat and the dog ate the other hat\n" * 800
TRIALS = {"compress_a_decoder": 70, "compress_an_encoder": 40, "search_your_own_module": 12}
"""About the least budgets of the searches of the notebooks."""
NOTEBOOK = f"""
import sys

import nbclient
import nbformat

notebook = nbformat.read(sys.argv[1], 4)
(cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
names = dict(TRIALS=int(sys.argv[3]), TEXT={TINY}, MODEL=sys.argv[2])
cell.source += "\\n" + "\\n".join(f"{{name}} = {{value!r}}" for name, value in names.items() if name in cell.source)
nbclient.NotebookClient(notebook, timeout=150, kernel_name="python3", resources=dict(metadata=dict(path="."))).execute()
"""
BLOCK = re.compile(r"(?:^<!-- (run(?::cpu)?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    page: str
    mark: str | None
    language: str
    text: str


@dataclass(frozen=True)
class Tried:
    """A command or a piece of Python that was run, what it gave, and what the page says it prints."""

    what: str
    code: int
    output: str
    expected: tuple[str, ...]


def pages() -> list[Path]:
    return [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def snippets(path: Path) -> list[Snippet]:
    return [Snippet(path.stem, mark or None, language, text) for mark, language, text in BLOCK.findall(path.read_text())]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `autoeff` command of a shell block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True)[1:] for line in lines if re.match(r"(\$ )?autoeff ", line)]


def all_commands() -> Iterator[tuple[str, list[str]]]:
    for path in pages():
        for snippet in snippets(path):
            if snippet.language in ("sh", "console", ""):
                yield from ((path.name, words) for words in commands(snippet.text))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Iterator[dict[str, list[Tried]]]:
    """Every marked block of every page, run."""
    import huggingface_hub.constants

    folder = tmp_path_factory.mktemp("tried")
    for name in ("train.txt", "held-out.txt"):
        (folder / name).write_text(WORDS)
    (folder / "short.txt").write_text("the cat sat on the mat")
    (folder / "tiny").symlink_to(tiny_models["llama"])
    (folder / "pickled").mkdir()
    shutil.copy(tiny_models["llama"] / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AUTOEFF_")]:
            patch.delenv(name)
        patch.setenv("AUTOEFF_HOME", str(folder / "home"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.chdir(folder)
        yield {page: [tried for snippet in snippets(DOCS / f"{page}.md") for tried in _try(snippet)] for page in ORDER}


def _try(snippet: Snippet) -> Iterator[Tried]:
    if snippet.mark is None or (snippet.mark == "run:cpu" and torch.cuda.is_available()):
        return
    if snippet.language == "python":
        small = ", ".join([f"trials={_least(['demo', '--knobs', 'bits,skip'])}", *(f"{name}={value}" for name, value in FAST.items())])
        source = re.sub(r"trials=\d+", small, snippet.text)
        yield _run(snippet.text, partial(exec, source, {"__name__": "__main__"}), ())
    elif snippet.language == "console":
        for part in re.split(r"^\$ ", snippet.text, flags=re.MULTILINE)[1:]:
            line, *expected = part.splitlines()
            words = shlex.split(line)[1:]
            text = ["--data", TINY["source"]] if words[:2] == ["search", "demo"] else []  # that of installed packages takes seconds to read
            yield _run(line, partial(main, words + text), tuple(expected))
    else:
        for words in commands(snippet.text):
            yield _run(shlex.join(words), partial(main, _fast(words)), ())


def _run(what: str, call: Callable[[], Any], expected: tuple[str, ...]) -> Tried:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = call()
    return Tried(what, code or 0, output.getvalue(), expected)


def _fast(words: Sequence[str]) -> list[str]:
    """A search in its fast form; other commands as they are."""
    if words[0] != "search":
        return list(words)
    rest = [word for i, word in enumerate(words[1:], 1) if word != "--trials" and words[i - 1] != "--trials"]
    return ["search", *rest, *_tiny_flags(), "--trials", str(_least(rest))]


def _tiny_flags() -> list[str]:
    texts = [f"--{'data' if name == 'source' else name}={value}" for name, value in TINY.items()]
    texts += [f"--eval-{'data' if name == 'source' else name}={value}" for name, value in TINY.items()]
    return [*texts, *(f"--levels={glob}={','.join(map(str, levels))}" for glob, levels in FAST["space"]["levels"].items())]


def _least(words: Sequence[str]) -> int:
    """The least budget of a search of a bundled model with these knobs."""
    knobs = words[list(words).index("--knobs") + 1] if "--knobs" in words else "bits"
    return plan(JobSpec.parse({"model": words[0], "knobs": knobs, **FAST}), Settings.read()).minimum_trials


@pytest.mark.parametrize("page", ORDER)
def test_marked_blocks_do_what_the_page_says(page: str, tried: dict[str, list[Tried]]) -> None:
    assert tried[page]
    for one in tried[page]:
        refused = any(line.startswith("autoeff: error:") for line in one.expected)
        assert one.code == (2 if refused else 0), f"{one.what}\n{one.output}"
        printed = [" ".join(line.split()) for line in one.output.splitlines()]
        for line in one.expected:
            pattern = ".*".join(map(re.escape, " ".join(line.split()).split("…")))
            assert any(re.search(pattern, text) for text in printed), f"{one.what} does not print\n{line}\nbut\n{one.output}"


def test_every_command_is_one_that_the_program_takes() -> None:
    found = list(all_commands())
    assert len(found) > 40
    group: Any = typer.main.get_command(app)
    for page, words in found:
        try:
            context = group.make_context("autoeff", list(words))
            name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)
        except Exception as error:
            pytest.fail(f"{page}: autoeff {shlex.join(words)}: {error!r}")


def test_every_verb_and_knob_stands_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    group: Any = typer.main.get_command(app)
    for word in [*group.commands, *known_knobs(), *known_quantizers(), *known_criteria()]:
        assert re.search(rf"\b{word}\b", text), word


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    parsed = {}
    for path in site.rglob("*.html"):
        parsed[path] = _Links()
        parsed[path].feed(path.read_text())
    assert len(parsed) > 10
    dead = []
    for path, page in parsed.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or to.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.exists() and (not to.fragment or target not in parsed or to.fragment in parsed[target].anchors)
            if not there:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead, "\n".join(dead)


def test_links_of_the_repository_lead_somewhere() -> None:
    dead = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text())
        if not urlsplit(link).scheme and not (path.parent / link).exists()
    ]
    assert not dead, "\n".join(dead)


def test_configuration_reference_is_complete(site: Path) -> None:
    text = (site / "reference" / "job" / "index.html").read_text()
    names = [*JobSpec.model_fields, *(f"AUTOEFF_{name.upper()}" for name in Settings.model_fields)]
    names += [
        f"{part}.{name}" for part, value in JobSpec(model="demo") if isinstance(value, BaseModel) for name in type(value).model_fields
    ]
    names += ["--set" if name == "settings" else "--" + name.replace("_", "-") for name in FIELDS if name != "model"]
    assert [name for name in names if f"<code>{name}</code>" not in text] == []


def test_every_knob_has_a_page_with_its_settings(site: Path) -> None:
    index = (site / "knobs" / "index.html").read_text()
    for name in known_knobs():
        text = (site / "knobs" / name / "index.html").read_text()
        assert f'href="{name}/"' in index
        assert "Source: " in text
        assert [s for s in make_knob(name, {}).settings() if f"<code>{name}.{s}</code>" not in text] == []


def test_every_quantizer_and_criterion_is_described(site: Path) -> None:
    text = (site / "reference" / "methods" / "index.html").read_text()
    assert [name for name in [*known_quantizers(), *known_criteria()] if f'id="{name}"' not in text] == []


@pytest.fixture
def float8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes the knob of the example package known, under the entry point that its `pyproject.toml` names."""
    import tomllib

    package = ROOT / "examples" / "float8_knob"
    points = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]["autoeff.knobs"]
    info = tmp_path / "autoeff_float8_knob-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: autoeff-float8-knob\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[autoeff.knobs]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()))
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.cache_clear()
    (name,) = points
    yield name
    plugins.cache_clear()


def _contract() -> ModuleType:
    spec = importlib.util.spec_from_file_location("knob_contract", ROOT / "tests" / "spaces" / "test_knob_contract.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_knob_keeps_the_contract(float8: str, tiny_model: Callable[..., Any]) -> None:
    knob = make_knob(float8, {})
    tests = {name: test for name, test in vars(_contract()).items() if name.startswith("test_")}
    run = []
    for name, test in tests.items():
        if (wanted := signature(test).parameters.keys()) <= {"knob", "model", "structure"} and "knob" in wanted:
            for family in ("llama", "gpt2"):
                model = tiny_model(family)
                given = {"knob": knob, "model": model, "structure": coupled(model, find_structure(model))[0]}
                test(**{name: given[name] for name in wanted})
            run.append(name)
    assert len(run) >= 7


def test_the_example_knob_is_searched_beside_others(float8: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOEFF_HOME", str(tmp_path / "home"))
    (tmp_path / "train.txt").write_text(WORDS)
    text = TINY | {"source": str(tmp_path / "train.txt")}
    spec = JobSpec.parse({"model": "demo", "knobs": [float8, "skip", "width"], "limits": ["avg_bits<=8"], "data": text, "eval_data": text})
    planned = plan(spec, Settings.read())
    assert {decision.knob for decision in planned.space.decisions} == {float8, "skip", "width"}
    uniform = planned.space.uniform[f"{float8}=fp8"]
    assert 8 < planned.problem.cost_model.values(planned.space.indices(uniform.levels))["avg_bits"] < 8.2


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fast form, which replaces the cell tagged `parameters`; stored outputs are those of the full one."""
    monkeypatch.setenv("AUTOEFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.txt").write_text(WORDS)
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(path), str(tiny_models["bert"]), str(TRIALS[path.stem])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_small_with_outputs_and_no_paths_of_a_machine(path: Path) -> None:
    import nbformat

    assert path.stat().st_size < 200_000
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == i for i, cell in enumerate(cells, 1))
    assert sum(bool(cell.outputs) for cell in cells) >= 2
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not re.search(r"/(root|home|work|tmp)/", path.read_text())
