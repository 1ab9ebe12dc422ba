"""What this machine evaluates on.

It is asked in a process of its own: CUDA that a process has looked at does not work in its forks, and would hold memory of the device
for as long as a worker lives, which leaves evaluating to its runner.
"""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from autoeff.errors import InputError

__all__ = ["Hardware", "hardware", "kind_of"]

_ASK = """
import json, torch
gpu = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name(0) if gpu else None,
    "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
}))
"""
_ANSWER_S = 120.0


@dataclass(frozen=True)
class Hardware:
    """A machine's device.

    Attributes:
        kind: As in the queue `gpu.KIND`: such as `h200`, or `cpu`.
        facts: Name, memory in bytes, cores, versions of torch and CUDA.
    """

    kind: str
    facts: Mapping[str, Any]


@functools.cache
def hardware() -> Hardware:
    """This machine's first device that CUDA shows, else its CPU.

    Raises:
        InputError: torch does not start.
    """
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    if done.returncode != 0:
        raise InputError(f"torch does not start here: {(done.stderr.strip().splitlines() or ['no word of why'])[-1]}")
    said = json.loads(done.stdout)
    gpu, memory_bytes = said.pop("gpu"), said.pop("memory_bytes")
    facts = {
        "name": gpu or platform.processor() or platform.machine(),
        "memory_bytes": memory_bytes or psutil.virtual_memory().total,
        "cores": psutil.cpu_count(),
        **said,
    }
    return Hardware("cpu" if gpu is None else kind_of(gpu), facts)


def kind_of(gpu: str) -> str:
    """The name of a GPU as a queue has it."""
    return "-".join(word for word in gpu.lower().split() if word not in ("nvidia", "amd", "geforce", "tesla"))
