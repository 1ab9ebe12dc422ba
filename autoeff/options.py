"""Arguments and options that several verbs of the command have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Batch",
    "Context",
    "Data",
    "Device",
    "Draw",
    "EvalData",
    "EvalWindows",
    "Exclude",
    "Include",
    "JobFile",
    "KnobSettings",
    "Length",
    "Levels",
    "ModelRef",
    "NewRun",
    "RunRef",
    "Seed",
    "TrialRef",
    "Windows",
    "option",
]


def option(panel: str, help_text: str, *names: str, metavar: str | None = None) -> Any:
    """An option under a panel of the help, by its own or these names."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar, show_default=False)


RunRef = Annotated[str, typer.Argument(metavar="RUN", help="A run directory or a job id.")]
TrialRef = Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's number, or best.")]
ModelRef = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help="Directory, hub id, or demo. May stand in --config.")
]
Windows = Annotated[int | None, option("Text", "Windows of text (sentences for encoders); 0 takes all.")]
Length = Annotated[int | None, option("Text", "Tokens per window.")]
Draw = Annotated[str | None, option("Text", "Which windows: random, first, or their starts.", metavar="random|first|N,N…")]
EvalData = Annotated[str | None, option("Text", "Held-out text; default is the last fifth of the search text.")]
EvalWindows = Annotated[int | None, option("Text", "As --windows, held-out text.")]
KnobSettings = Annotated[list[str] | None, option("Space", "A knob's setting; may be repeated.", "--set", metavar="KNOB.NAME=VALUE")]
Include = Annotated[list[str] | None, option("Space", "Only decisions (site:knob) like this; may be repeated.", metavar="GLOB")]
Exclude = Annotated[list[str] | None, option("Space", "No decisions like this; may be repeated.", metavar="GLOB")]
Levels = Annotated[
    list[str] | None, option("Space", "Only these levels where decisions match; may be repeated.", metavar="GLOB=LEVEL,LEVEL…")
]
Batch = Annotated[int | None, option("Goal", "Sequences decoded together, for cache and read costs.")]
Context = Annotated[int | None, option("Goal", "Tokens in the cache, for cache and read costs.")]
JobFile = Annotated[Path | None, option("Run", "A job in YAML or JSON; flags win over it.", metavar="FILE")]
NewRun = Annotated[Path | None, option("Run", "New folder for the run; default runs/<model>-<time>.", metavar="DIR")]
Data = Annotated[str | None, option("Text", "Text to measure on, as in search.")]
Seed = Annotated[int | None, option("Run", "Draws the windows; default 0.")]
Device = Annotated[str | None, option("Run", "cpu, cuda or cuda:N; default cpu.")]
