"""The kernels alone, in a tree that has nothing else, on a machine that has torch and Triton."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autoeff.kernels.timing import __file__ as there

ALONE = """
import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

tree = sys.argv[1]
owners = {module: {name.lower().replace("_", "-") for name in names} for module, names in packages_distributions().items()}
wanted, waiting = set(), ["torch", "triton", "numpy"]
while waiting:  # and what they need themselves
    name = waiting.pop()
    if name not in wanted:
        wanted.add(name)
        try:
            needed = [line for line in requires(name) or () if "extra ==" not in line]
        except PackageNotFoundError:  # it is for other machines
            continue
        waiting += [re.match("[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-") for line in needed]
forbidden = {module for module, names in owners.items() if not names & wanted} - {"autoeff"}
assert {"transformers", "safetensors", "matplotlib"} <= forbidden


class Others:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ModuleNotFoundError(f"no module named {name!r}", name=name)


sys.meta_path.insert(0, Others)
sys.path.insert(0, tree)


def run(module, *arguments):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"autoeff.kernels.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(module, "ended with", end.code)


run("bench", "--ops", "kv_evict", "--phases", "prefill", "--rounds", "2", "--models", "demo", "--out", tree + "/out")
run("tune", "--rounds", "1")
from autoeff.kernels import compile

row = compile.compile_case(next(case for case in compile.cases() if case.name == "kv_evict gather"))
print(row.as_json())
run("compile", "--wrong")
assert all(m.__file__ is None or m.__file__.startswith(tree) for n, m in sys.modules.items() if n.startswith("autoeff."))
"""


def test_bench_tune_and_compile_run_from_a_bare_tree(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "autoeff").mkdir()
    (tmp_path / "autoeff" / "__init__.py").touch()
    shutil.copytree(Path(there).resolve().parent, tmp_path / "autoeff" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert "bench ended with 0" in lines
    assert "tune ended with 2" in lines
    assert '"spill": 0' in lines[-2]
    assert lines[-1] == "compile ended with 2"
    assert (tmp_path / "out" / "kernels.json").exists()
