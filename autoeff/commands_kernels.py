"""The verbs of the kernels: `kernels bench`, `kernels tune` and `kernels compile`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from autoeff.errors import ExitCode, InputError

__all__ = ["kernels"]

kernels = typer.Typer(name="kernels", help="Times, tunes and compiles the kernels.", no_args_is_help=True)

_Ops = Annotated[str | None, typer.Option(help="Operations; default all.", metavar="NAME,NAME…", show_default=False)]
_TARGETS = ("sm_90",)


@kernels.command()
def bench(
    ops: _Ops = None,
    models: Annotated[str | None, typer.Option(help="Whose shapes; default all on a GPU, demo on a CPU.", show_default=False)] = None,
    phases: Annotated[str | None, typer.Option(help="decode, prefill or both; default both.", show_default=False)] = None,
    rounds: Annotated[int, typer.Option(help="Alternating rounds of a shape, at least 2.")] = 30,
    out: Annotated[
        Path | None, typer.Option(help="Folder for kernels.json, kernels.md and roofline.png.", metavar="DIR", show_default=False)
    ] = None,
) -> None:
    """Times every operation on this device, beside the 16-bit path and what a user would pick instead."""
    _run("bench", {"ops": ops, "models": models, "phases": phases, "rounds": rounds, "out": out})
    if out is not None:
        from autoeff.roofline import draw_roofline

        draw_roofline(json.loads((out / "kernels.json").read_text(encoding="utf-8"))).savefig(out / "roofline.png", dpi=150)


@kernels.command()
def tune(ops: _Ops = None, rounds: Annotated[int, typer.Option(help="Replays of a timing, at least 2.")] = 20) -> None:
    """Finds fast configurations for the GPU at hand and keeps them; goes on where it was interrupted."""
    _run("tune", {"ops": ops, "rounds": rounds})


@kernels.command(name="compile")
def compile_all(
    target: Annotated[str, typer.Option(help="Architecture; sm_90 is Hopper.")] = _TARGETS[0],
    only: Annotated[
        str | None, typer.Option("--kernels", help="Kernels whose names start so; default all.", metavar="NAME,NAME…", show_default=False)
    ] = None,
) -> None:
    """Compiles every kernel without a GPU: a JSON row each, with registers, spills, shared memory and tensor cores; 1 if one is no good."""
    if target not in _TARGETS:
        raise InputError(f"cannot compile for {target!r}; allowed: {', '.join(_TARGETS)}")
    try:
        from autoeff.kernels.compile import cases, compile_case
    except ImportError:
        raise InputError("compiling needs Triton, which is not installed: pip install 'triton>=3.6'") from None
    wanted = tuple((only or "").split(","))
    found, passed = 0, True
    for case in cases():
        if case.name.startswith(wanted):
            row = compile_case(case)
            found, passed = found + 1, passed and row.passes
            sys.stdout.write(row.as_json() + "\n")
            sys.stdout.flush()
    if not found:
        raise InputError(f"no kernel starts with {only!r}")
    if not passed:
        raise typer.Exit(ExitCode.FAILURE)


def _run(module: str, options: dict[str, object]) -> None:
    """As `python -m autoeff.kernels.MODULE`, whose errors and exit codes are kept."""
    arguments = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    try:
        code = import_module(f"autoeff.kernels.{module}").main(arguments)
    except SystemExit as error:  # argparse has said what is wrong
        code = error.code
    if code:
        raise typer.Exit(int(code))
