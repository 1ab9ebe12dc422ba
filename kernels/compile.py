"""Compiles every Triton kernel for Hopper (sm_90) on a machine without a GPU, and says what it takes of the chip.

    python -m autoeff.kernels.compile [--json | --write]

A kernel module takes part by a function `hopper_cases`, which yields every kernel x width x dtype x committed configuration. A row is
refused if it spills, needs more shared memory than a program may have, or lacks `wgmma` where its tile is large enough for it.
`--write` leaves all rows in `tuning/compiled.json`; a test compares it with the committed configurations and the kernels' sources.
What compiling cannot show: speed, races and numbers.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas

__all__ = ["RESULTS", "SHARED_BYTES", "Case", "Resources", "Row", "cases", "compile_case", "hopper", "main", "resources", "source"]

RESULTS = Path(__file__).resolve().parent / "tuning" / "compiled.json"
SHARED_BYTES = 232_448
"""Shared memory that one program may use on sm_90; Triton checks it only at launch."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: Per thread.
        spill_bytes: Registers spilled to memory, per thread; 0 in a kernel that is good for anything.
        shared_bytes: Shared memory per program.
        wgmma: Whether it uses Hopper's asynchronous tensor cores.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: bool

    @property
    def fits(self) -> bool:
        return self.spill_bytes == 0 and self.shared_bytes <= SHARED_BYTES


@dataclass(frozen=True)
class Case:
    """What is compiled: one launch, its tensors on the meta device.

    Attributes:
        name: Of the kernel.
        config: What distinguishes the case from others of the kernel.
        kernel, grid, arguments, options: Of the launch.
        tensor_cores: Whether `wgmma` must be there: a product whose left tile has at least 64 rows.
    """

    name: str
    config: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    tensor_cores: bool


@dataclass(frozen=True)
class Row:
    """A compiled case and its verdict."""

    case: Case
    used: Resources

    @property
    def passes(self) -> bool:
        return self.used.fits and (self.used.wgmma or not self.case.tensor_cores)

    def as_json(self) -> str:
        used = self.used
        return json.dumps({
            "kernel": self.case.name, "config": self.case.config, "registers": used.registers, "spill": used.spill_bytes,
            "shared_bytes": used.shared_bytes, "wgmma": used.wgmma,
        })  # fmt: skip


@contextmanager
def hopper() -> Iterator[None]:
    """Within it Triton compiles for sm_90; nothing can be launched."""
    config = triton.runtime.driver
    before = config._active  # the public `reset_active` would look for a real GPU
    config.set_active(_Hopper())
    try:
        yield
    finally:
        config._active = before


def resources(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Resources:
    """Compiles `kernel` as a launch with these arguments would (tensors may be on the meta device).

    Raises:
        RuntimeError: The process runs Triton's interpreter.
        subprocess.CalledProcessError: The assembler refuses the PTX.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("cannot compile while TRITON_INTERPRET is set; unset it")
    with hopper():
        compiled = kernel.warmup(*arguments, grid=grid, **options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        # the plain `ptxas` of the wheel may be older than the PTX version emitted
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", str(source.with_suffix(".cubin")), str(source)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Resources(
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log),
        shared_bytes=compiled.metadata.shared,
        wgmma="wgmma" in ptx,
    )


def cases() -> Iterator[Case]:
    """Every case of every kernel module beside this one."""
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name != "compile":
            module = importlib.import_module(f"autoeff.kernels.{info.name}")
            for case in getattr(module, "hopper_cases", lambda: ())():
                yield Case(*case)


def compile_case(case: Case) -> Row:
    """What the case takes of the chip."""
    return Row(case, resources(case.kernel, case.grid, case.arguments, case.options))


class _Hopper(DriverBase):  # type: ignore[misc]
    """A driver that names its target and can do nothing else."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return -1  # what is compiled here must not be found in the cache of a real GPU

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self) -> None:
        return None


def source(kernel: Any) -> str:
    """A digest of the kernel's text and of that of the functions it calls; comments count, their place in the file does not."""
    texts: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        texts[function.__name__] = function.src
        names = set(re.findall(r"\w+", function.src)) - texts.keys()
        waiting += [found for name in names if isinstance(found := function.fn.__globals__.get(name), triton.JITFunction)]
    return hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:16]


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"ptxas printed no match of {pattern!r}: {log!r}")
    return int(found[1])


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if arguments not in ([], ["--json"], ["--write"]):
        print("usage: python -m autoeff.kernels.compile [--json | --write]", file=sys.stderr)  # noqa: T201
        return 2
    failed, lines, sources = 0, [], {}
    for row in map(compile_case, cases()):
        failed += not row.passes
        lines.append(row.as_json())
        if arguments == ["--write"]:
            sources[row.case.name] = source(row.case.kernel)
        used = row.used
        text = (
            f"{'ok  ' if row.passes else 'FAIL'} {row.case.name}, {row.case.config}: {used.registers} registers, "
            f"{used.spill_bytes} B spilled, {used.shared_bytes} B shared{', wgmma' if used.wgmma else ''}"
        )
        print(lines[-1] if arguments == ["--json"] else text, flush=True)  # noqa: T201
    if arguments == ["--write"]:  # a row a line, for reading and for comparing
        rows = ",\n".join(f"    {line}" for line in lines)
        head = f'  "target": "sm_90",\n  "triton": "{triton.__version__}",\n  "sources": {json.dumps(sources, indent=4)[:-1]}  }},\n'
        RESULTS.write_text(f'{{\n{head}  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
