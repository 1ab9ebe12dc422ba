"""Starts the process in which Triton interprets: its switch must be set before Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_pass_their_tests_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    # with more threads the interpreter's small matrix products are ten times slower
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted", str(Path(__file__).parent)]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert re.search(r"^\d+ passed", run.stdout.splitlines()[-1]), run.stdout
    assert "skipped" not in run.stdout.splitlines()[-1]
