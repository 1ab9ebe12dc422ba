"""Which room may know what, what importing costs, and what never appears in the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room may import itself and those before it; only faces stand side by side.
BELOW = {
    "kernels": {"kernels"},
    "spaces": {"__version__", "errors", "kernels", "spaces"},
    "evaluators": {"__version__", "errors", "kernels", "spaces", "evaluators"},
    "search": {"__version__", "errors", "kernels", "spaces", "evaluators", "search"},
    "api": {"__version__", "errors", "kernels", "spaces", "evaluators", "search", "api"},
    "dashboard": {"Client", "__version__", "client", "errors", "flags", "kernels", "spaces", "evaluators", "search", "dashboard"},
}
ROOMS = tuple(BELOW)

# A bare GPU machine has these and no more; what evaluates there may import nothing else.
LIGHT = {"torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy", "yaml"}
EXTRAS = {"PIL", "datasets", "jinja2", "lm_eval"}  # imported where they are used, with a line that says what to install
PACKAGES = {"kernels": {"torch", "triton"}, "spaces": LIGHT, "evaluators": LIGHT | EXTRAS}

# Absent from a bare GPU machine, or forbidden there.
HEAVY = [
    *("alembic", "celery", "datasets", "fastapi", "jinja2", "lm_eval", "matplotlib", "optuna", "peft", "PIL", "psutil", "pydantic"),
    "pydantic_settings",
    *("redis", "rich", "scipy", "sqlalchemy", "streamlit", "typer"),
]


def sources(*folders: str) -> list[Path]:
    """Python files of these folders of the checkout, links not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(where, dotted name) of every import in the file, those inside functions and `TYPE_CHECKING` too."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else [f"autoeff.<{'.' * node.level}>"]
        else:
            continue
        for name in names:
            yield f"{relative(path)}:{node.lineno}", name


def modules(*rooms: str) -> list[str]:
    """Dotted names of the modules of these rooms; migrations are run by Alembic and never imported."""
    names = []
    for path in sources(*rooms):
        if "migrations" not in path.parts:
            parts = ("autoeff", *path.relative_to(ROOT).with_suffix("").parts)
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def python(code: str, *arguments: str) -> str:
    """What `code` prints, run in an interpreter of its own to its end."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down_only(room: str) -> None:
    upward = [
        f"{where} imports {name}"
        for path in sources(room)
        for where, name in imports(path)
        if name.split(".")[0] == "autoeff" and f"{name}.__version__".split(".")[1] not in BELOW[room]
    ]
    assert not upward, "\n".join(upward)


def test_errors_stand_below_every_room() -> None:
    known = [name for _, name in imports(ROOT / "autoeff" / "errors.py") if name.split(".")[0] not in sys.stdlib_module_names]
    assert not known, "\n".join(known)


@pytest.mark.parametrize("room", sorted(PACKAGES))
def test_light_rooms_import_only_what_a_bare_gpu_machine_has(room: str) -> None:
    foreign = [
        f"{where} imports {name}"
        for path in sources(room)
        for where, name in imports(path)
        if name.split(".")[0] not in {"autoeff", *PACKAGES[room]} | sys.stdlib_module_names
    ]
    assert not foreign, "\n".join(foreign)


def test_light_rooms_work_without_the_packages_of_the_others() -> None:
    names = modules("kernels", "spaces", "evaluators")
    assert len(names) > 10
    python(
        """
import importlib, sys

class Without:
    \"\"\"A finder that does not find the packages in `absent`.\"\"\"

    def __init__(self, finder, absent):
        self.finder, self.absent = finder, absent

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.absent else self.finder.find_spec(name, path, target)

absent = set(sys.argv[1].split(","))
sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]
for name in sys.argv[2:]:
    importlib.import_module(name)
assert not absent & set(sys.modules)
""",
        ",".join(HEAVY),
        *names,
    )


@pytest.mark.parametrize("package", ["autoeff", "autoeff.errors", *(f"autoeff.{room}" for room in ROOMS), "autoeff.cli"])
def test_importing_a_package_loads_no_engine(package: str) -> None:
    loaded = python(
        """
import importlib, sys

importlib.import_module(sys.argv[1])
engines = {"torch", "triton", "transformers", "optuna", "sqlalchemy", "scipy", "matplotlib", "streamlit", "celery"}
print(*sorted(engines & set(sys.modules)))
""",
        package,
    )
    assert loaded.split() == []


@pytest.mark.parametrize(
    "module", ["autoeff.search.celery_app", "autoeff.search.station", "autoeff.search.service", "autoeff.search.job", "autoeff.client"]
)
def test_workers_coordinators_and_clients_load_no_engine_that_evaluates(module: str) -> None:
    loaded = python(
        "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{'torch', 'transformers'} & set(sys.modules))", module
    )
    assert loaded.split() == []


def loads_pickles(path: Path) -> Iterator[str]:
    """Where the file could run code that a model or a result brings along."""
    for where, name in imports(path):
        if name in {"torch.load", "torch.save"} or name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}:
            yield f"{where} imports {name}"
    for node in ast.walk(parse(path)):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in {"load", "save"}
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ):
            yield f"{relative(path)}:{node.lineno} uses torch.{node.attr}"


def test_nothing_unpickles() -> None:
    found = [
        line
        for path in sources("autoeff", *ROOMS, "benchmarks", "examples", "tests")
        if relative(path) != "examples/train_demo.py"
        for line in loads_pickles(path)
    ]
    assert not found, "\n".join(found)


def public_modules() -> list[Path]:
    """Modules that people read and import; migrations are scripts."""
    return [
        p for p in sources("autoeff", *ROOMS) if (not p.name.startswith("_") or p.name == "__init__.py") and "migrations" not in p.parts
    ]


def test_every_public_module_says_what_it_is() -> None:
    silent = [relative(path) for path in public_modules() if not ast.get_docstring(parse(path))]
    assert not silent, "\n".join(silent)


def exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff's RUF022 sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_every_public_module_lists_its_names_in_order() -> None:
    wrong = []
    for path in public_modules():
        tree = parse(path)
        names = exported(tree)
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign) for node in tree.body)
        if names is None and defines:
            wrong.append(f"{relative(path)} has no __all__")
        elif names is not None and names != sorted(set(names), key=order):
            wrong.append(f"{relative(path)} has an unsorted __all__")
    assert not wrong, "\n".join(wrong)
