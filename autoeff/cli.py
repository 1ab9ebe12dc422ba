"""The command line: `autoeff search MODEL …`, and the verbs that resume, read and export what it left.

Results go to standard output, progress and errors to standard error. Exit codes: 0 a feasible configuration was found (or the verb
did its work), 1 failure, 2 bad input, 3 the search ended without a feasible configuration, 130 interrupted. Engine and models are
imported by the verbs that need them, so that `--help` and the read verbs answer at once.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import autoeff
from autoeff import commands_dashboard, commands_kernels, commands_server, commands_service
from autoeff.console import Watcher, print_error, print_json, print_pairs, print_table
from autoeff.errors import AutoeffError, ExitCode, InputError
from autoeff.flags import job_fields, seconds_of
from autoeff.options import (
    Batch,
    Context,
    Data,
    Device,
    Draw,
    EvalData,
    EvalWindows,
    Exclude,
    Include,
    JobFile,
    KnobSettings,
    Length,
    Levels,
    ModelRef,
    NewRun,
    RunRef,
    Seed,
    TrialRef,
    Windows,
    option,
)
from autoeff.sources import Listing, Local, Remote, Shown, Source, opened
from autoeff.spaces.measurements import MEASURES, described

if TYPE_CHECKING:
    from autoeff.search.job import JobSpec
    from autoeff.search.run import Result

__all__ = ["Form", "app", "main"]

app = typer.Typer(
    name="autoeff",
    help="Searches, layer by layer, for the transformer configuration that keeps the most quality inside a limit.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]  # click's own, or that of the copy which newer versions of typer carry
app.command()(commands_service.worker)
app.command()(commands_service.coordinator)
app.add_typer(commands_service.database)
app.command()(commands_server.serve)
app.command()(commands_dashboard.dashboard)
app.add_typer(commands_server.keys)
app.add_typer(commands_kernels.kernels)


class Form(StrEnum):
    """How a verb prints."""

    TABLE = "table"
    JSON = "json"


Format = Annotated[Form, typer.Option("--format", help="How to print.")]


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--server", metavar="URL", envvar="AUTOEFF_SERVER", help="Have a server do it; the key is in AUTOEFF_KEY.", show_default=False
        ),
    ] = None,
) -> None:
    ctx.obj = server
    if version:
        sys.stdout.write(f"autoeff {autoeff.__version__}\n")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        sys.stdout.write(ctx.get_help() + "\n")


@app.command()
def search(
    ctx: typer.Context,
    model: ModelRef = None,
    data: Annotated[
        str | None, option("Text", "Search text: file, directory, JSONL, parquet, CSV of scored pairs, package:NAME or hub:OWNER/NAME.")
    ] = None,
    windows: Windows = None,
    length: Length = None,
    draw: Draw = None,
    bos: Annotated[str | None, option("Text", "Where a BOS token is put.", metavar="per_window|per_document")] = None,
    eval_data: EvalData = None,
    eval_windows: EvalWindows = None,
    eval_length: Annotated[int | None, option("Text", "As --length, held-out text.")] = None,
    eval_draw: Annotated[str | None, option("Text", "As --draw, held-out text.")] = None,
    eval_bos: Annotated[str | None, option("Text", "As --bos, held-out text.")] = None,
    tune_data: Annotated[str | None, option("Text", "Text that adapters are trained on (knob lora_rank).")] = None,
    tune_windows: Annotated[int | None, option("Text", "As --windows, text that adapters are trained on; default all.")] = None,
    tune_length: Annotated[int | None, option("Text", "As --length, text that adapters are trained on.")] = None,
    tune_draw: Annotated[str | None, option("Text", "As --draw, text that adapters are trained on.")] = None,
    tune_bos: Annotated[str | None, option("Text", "As --bos, text that adapters are trained on.")] = None,
    knobs: Annotated[str | None, option("Space", "Knobs to search; default bits.", metavar="NAME,NAME…")] = None,
    settings: KnobSettings = None,
    include: Include = None,
    exclude: Exclude = None,
    levels: Levels = None,
    untie: Annotated[bool | None, option("Space", "Let fused linears (q/k/v, gate/up) decide apart.", "--untie/--tie")] = None,
    objective: Annotated[str | None, option("Goal", "What to minimise; quality first.", metavar="NAME,NAME…")] = None,
    limit: Annotated[
        list[str] | None, option("Goal", "A hard limit such as weight_bytes<=0.30x or decode_ms<=4ms; may be repeated.", metavar="LIMIT")
    ] = None,
    tasks: Annotated[str | None, option("Goal", "Tasks of lm-eval to ask finalists (extra tasks).", metavar="NAME,NAME…")] = None,
    tasks_path: Annotated[str | None, option("Goal", "Folder of task files of one's own.", metavar="DIR")] = None,
    task_documents: Annotated[int | None, option("Goal", "Documents asked of each task; default all.")] = None,
    max_degradation: Annotated[float | None, option("Goal", "Share of dense accuracy that may be lost on any task, e.g. 0.01.")] = None,
    metric: Annotated[
        list[str] | None,
        option("Goal", "Own function of model and tokenizer, for finalists; may be repeated.", metavar="PACKAGE.MODULE:FUNCTION"),
    ] = None,
    batch: Batch = None,
    context: Context = None,
    trials: Annotated[int | None, option("Search", "Budget in full-token evaluations; default 300.")] = None,
    timeout: Annotated[str | None, option("Search", "Budget of wall time: 90s, 20m, 2h.", metavar="TIME")] = None,
    sampler: Annotated[str | None, option("Search", "Who proposes; default additive.")] = None,
    seeds: Annotated[str | None, option("Search", "Rules as guests; default all that apply; none.", metavar="NAME,NAME…")] = None,
    table_only: Annotated[bool | None, option("Search", "Measure the damage table and stop there.", "--table-only")] = None,
    seed: Annotated[int | None, option("Search", "Draws the windows and everything random; default 0.")] = None,
    device: Annotated[str | None, option("Search", "cpu, cuda or cuda:N; default cpu.")] = None,
    queue: Annotated[str | None, option("Search", "On a server, its workers: cpu, gpu.any, gpu.KIND; default by the device.")] = None,
    target: Annotated[
        str | None, option("Goal", "A GPU that is not here, such as H200, for estimated decode_ms and prefill_ms.", metavar="GPU")
    ] = None,
    config: JobFile = None,
    out: NewRun = None,
    dry_run: Annotated[bool, option("Run", "Check the job, print what is known of it, and stop.", "--dry-run")] = False,
    form: Format = Form.TABLE,
) -> None:
    """Searches a model for its best configurations within limits."""
    from autoeff.search import run
    from autoeff.search.facts import plan_facts
    from autoeff.search.job import JobSpec
    from autoeff.search.runs import check_new
    from autoeff.search.settings import Settings

    spec = JobSpec.parse(job_fields(ctx.params, {} if config is None else JobSpec.read(config)))
    if ctx.obj is not None:
        with _server(ctx) as server:
            _search_there(server, spec, out, form, dry_run=dry_run)
        return
    machine = Settings.read()
    if dry_run:
        _print_plan(plan_facts(run.plan(spec, machine), machine), form)
        return
    folder = run.default_folder(spec.model) if out is None else out
    check_new(folder)
    with _resumable(folder), Watcher() as watcher:
        result = run.start(spec, folder, machine, watcher.watch)
    _print_run(result, form)
    raise typer.Exit(result.exit_code)


@app.command()
def resume(
    ctx: typer.Context,
    run: RunRef,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try the trials that failed again.")] = False,
    form: Format = Form.TABLE,
) -> None:
    """Goes on with a search that was stopped or killed."""
    if ctx.obj is not None:
        with _server(ctx) as server:
            _follow_there(server, server.resume(run, retry_failed=retry_failed), server.folder(run), form)
        return
    from autoeff.search.run import resume as resume_run
    from autoeff.search.settings import Settings

    with _resumable(Path(run)), Watcher() as watcher:
        result = resume_run(run, Settings.read(), watcher.watch, retry_failed=retry_failed)
    _print_run(result, form)
    raise typer.Exit(result.exit_code)


@app.command()
def pause(
    ctx: typer.Context,
    run: RunRef,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for evaluations that are under way; they are made anew.")] = False,
    form: Format = Form.TABLE,
) -> None:
    """Has a search propose nothing more, until `resume`; it may run here, in another process, or on a server."""
    with _source(ctx) as source:
        source.pause(run, at_once=now)
        _print_status(source.status(run), form)


@app.command()
def cancel(ctx: typer.Context, run: RunRef, form: Format = Form.TABLE) -> None:
    """Ends a search for good; what it measured stays."""
    with _source(ctx) as source:
        source.cancel(run)
        _print_status(source.status(run), form)


@app.command()
def budget(
    ctx: typer.Context,
    run: RunRef,
    trials: Annotated[int | None, typer.Option(min=1, help="Evaluations in all.", show_default=False)] = None,
    timeout: Annotated[str | None, typer.Option(help="Wall time in all: 90s, 20m, 2h.", metavar="TIME", show_default=False)] = None,
    form: Format = Form.TABLE,
) -> None:
    """Changes how much a search may use that has not ended, also while it runs."""
    if trials is None and timeout is None:
        raise InputError("name the new budget with --trials, --timeout or both")
    with _source(ctx) as source:
        source.change_budget(run, trials, None if timeout is None else seconds_of(timeout))
        _print_status(source.status(run), form)


@app.command()
def status(ctx: typer.Context, run: RunRef, form: Format = Form.TABLE) -> None:
    """Says where a search stands."""
    with _source(ctx) as source:
        facts = source.status(run)
    _print_status(facts, form)
    if form is Form.TABLE and facts["state"] in ("pending", "running", "paused") and facts["driven_by"] is None:
        sys.stderr.write(f"autoeff: nobody drives this search; `autoeff resume {run}` goes on with it\n")


@app.command()
def ls(
    ctx: typer.Context, run: Annotated[str | None, typer.Argument(metavar="[RUN]", show_default=False)] = None, form: Format = Form.TABLE
) -> None:
    """Lists the jobs of this machine, or the trials of a run."""
    with _source(ctx) as source:
        if run is None:
            _print_jobs(source.jobs(), form)
        else:
            _print_rows(source.trials(run), form)


@app.command()
def show(ctx: typer.Context, run: RunRef, trial: TrialRef, form: Format = Form.TABLE) -> None:
    """Shows one trial: its configuration, what was measured, and its log if it failed."""
    with _source(ctx) as source:
        _print_trial(source.trial(run, trial), form)


@app.command()
def pareto(ctx: typer.Context, run: RunRef, form: Format = Form.TABLE) -> None:
    """Lists the trials on the Pareto front, also while the search goes on."""
    with _source(ctx) as source:
        _print_rows(source.front(run), form)


@app.command()
def best(ctx: typer.Context, run: RunRef, form: Format = Form.TABLE) -> None:
    """Shows the best trial within the limits; the closest one, and exit code 3, where the search found none."""
    with _source(ctx) as source:
        shown = source.trial(run, "best")
        feasible = source.feasible(run)
    _print_trial(shown, form)
    if not feasible:
        sys.stderr.write("autoeff: no trial keeps the limits; this one is the closest\n")
        raise typer.Exit(ExitCode.INFEASIBLE)


@app.command()
def resolve(
    ctx: typer.Context,
    run: RunRef,
    limit: Annotated[
        list[str] | None, option("Goal", "The new budget, such as linear_bytes<=0.22x; may be repeated.", metavar="LIMIT")
    ] = None,
    measure_them: Annotated[
        bool, option("Run", "Measure up to 24 proposals with the model, and keep them as trials of the run.", "--measure")
    ] = False,
    form: Format = Form.TABLE,
) -> None:
    """Answers a new budget from what a search has measured, in seconds and without the model."""
    from autoeff.tables import print_resolution

    with _source(ctx) as source, Watcher() as watcher:
        resolution = source.resolve(run, limit or (), measure=measure_them, watch=watcher.watch)
    if form is Form.JSON:
        print_json(resolution.to_json())
    else:
        print_resolution(resolution)


@app.command()
def sensitivity(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL|RUN", show_default=False, help="A model to measure, or a run whose table is shown.")
    ] = None,
    data: Data = None,
    windows: Windows = None,
    length: Length = None,
    draw: Draw = None,
    knobs: Annotated[str | None, option("Space", "Knobs to measure; default bits.", metavar="NAME,NAME…")] = None,
    settings: KnobSettings = None,
    include: Include = None,
    exclude: Exclude = None,
    levels: Levels = None,
    seed: Seed = None,
    device: Device = None,
    config: JobFile = None,
    out: Annotated[
        Path | None, option("Run", "New folder for the run; default runs/<model>-<time>. Of a RUN: folder for the picture.", metavar="DIR")
    ] = None,
    form: Format = Form.TABLE,
) -> None:
    """Measures, or shows, what each level of each decision costs in quality alone, the worst first."""
    from autoeff.search.sensitivity import full_table, is_run, write_damage
    from autoeff.search.sensitivity import sensitivity as of_run
    from autoeff.search.settings import Settings

    machine = Settings.read()
    picture = None
    if model is not None and is_run(model, machine):
        given = [name for name, value in ctx.params.items() if value and name not in ("model", "out", "form")]
        if given:
            raise InputError(f"{model} is a run, whose table is measured already; --{given[0].replace('_', '-')} is for a model")
        found = of_run(model, machine)
        picture = None if out is None else write_damage(found, out, machine)
    else:
        from autoeff.search.job import JobSpec
        from autoeff.search.run import default_folder

        spec = JobSpec.parse(job_fields(ctx.params, {} if config is None else JobSpec.read(config)))
        folder = default_folder(spec.model) if out is None else out
        with _resumable(folder), Watcher() as watcher:
            found = full_table(spec, folder, machine, watcher.watch)
        picture = write_damage(found, folder, machine)
    if form is Form.JSON:
        print_json(found.to_json() | {"picture": None if picture is None else str(picture)})
        return
    from autoeff.tables import print_sensitivity

    print_sensitivity(found)
    if picture is not None:
        print_pairs({"picture": picture})


@app.command()
def allocate(
    ctx: typer.Context,
    model: ModelRef = None,
    rule: Annotated[str, option("Space", "Published rules such as owl, separated by commas.", metavar="NAME,NAME…")] = "",
    limit: Annotated[list[str] | None, option("Goal", "A hard limit such as linear_bytes<=0.6x; may be repeated.", metavar="LIMIT")] = None,
    knobs: Annotated[str | None, option("Space", "Knobs to decide about; default those of the rules.", metavar="NAME,NAME…")] = None,
    settings: KnobSettings = None,
    levels: Levels = None,
    data: Data = None,
    windows: Windows = None,
    length: Length = None,
    eval_data: EvalData = None,
    eval_windows: EvalWindows = None,
    batch: Batch = None,
    context: Context = None,
    seed: Seed = None,
    device: Device = None,
    config: JobFile = None,
    out: NewRun = None,
    form: Format = Form.TABLE,
) -> None:
    """Shares out a budget by published rules, without a search, and measures what they give beside the baselines."""
    from autoeff.search import run
    from autoeff.search.allocate import rule_job
    from autoeff.search.job import JobSpec
    from autoeff.search.settings import Settings

    machine = Settings.read()
    spec = rule_job(job_fields(ctx.params, {} if config is None else JobSpec.read(config)), rule, machine)
    folder = run.default_folder(spec.model) if out is None else out
    with _resumable(folder), Watcher() as watcher:
        result = run.start(spec, folder, machine, watcher.watch)
    _print_run(result, form)
    raise typer.Exit(result.exit_code)


@app.command()
def compare(
    ctx: typer.Context,
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Run directories or job ids.")],
    out: Annotated[Path | None, option("Run", "New folder for a picture of the fronts.", metavar="DIR")] = None,
    form: Format = Form.TABLE,
) -> None:
    """Compares searches of one model on one text: what they found, the best of each at common budgets, settings that differ."""
    from autoeff.search.compare import write_fronts
    from autoeff.tables import print_comparison

    with _source(ctx) as source:
        comparison = source.compare(runs)
    picture = None if out is None else str(write_fronts(comparison, out))
    if form is Form.JSON:
        print_json(comparison.to_json() | {"picture": picture})
        return
    print_comparison(comparison)
    if picture is not None:
        print_pairs({"fronts": picture})


@app.command()
def export(
    ctx: typer.Context,
    run: RunRef,
    trial: TrialRef,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    format_name: Annotated[str, typer.Option("--format", metavar="hf-dense|recipe", help="What to write.")] = "hf-dense",
) -> None:
    """Writes a trial's configuration, loads it in a fresh process and measures it again."""
    with _source(ctx) as source:
        done = source.export(run, trial, folder, format_name)
    quality = done["quality"]
    print_pairs(
        {
            "folder": done["folder"],
            "format": done["format"],
            "files": ", ".join(done["files"]),
            f"{quality} of the trial": f"{done['trial']:.6g}",
            f"{quality} after reload": f"{done['measured']:.6g}",
            "linear_bytes": f"{done['linear_bytes']} as packed; files in the original shapes are larger",
        }
    )


@app.command()
def doctor(form: Format = Form.TABLE) -> None:
    """Says what this machine has, what is missing, and what mends it."""
    from autoeff.search.doctor import examine
    from autoeff.search.settings import Settings

    report = examine(Settings.read())
    if form is Form.JSON:
        print_json(report.to_json())
    else:
        print_table(["state", "what", "found", "remedy"], [[c.state, c.name, c.found, c.remedy] for c in report.checks], left=4)
        sys.stdout.write("\n")
        print_table(["kind", "name", "from"], [[p.kind, p.name, p.where] for p in report.plugins], left=3)
    raise typer.Exit(ExitCode.FEASIBLE if report.healthy else ExitCode.FAILURE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; whatever goes wrong becomes one line on standard error."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries tell their developers
    try:
        code = typer.main.get_command(app)(args=argv, prog_name="autoeff", standalone_mode=False)
        sys.stdout.flush()
    except AutoeffError as error:
        print_error(str(error))
        return error.exit_code
    except _USAGE_ERROR as error:
        print_error(f"{error.format_message()} Try `autoeff --help`.")  # type: ignore[attr-defined]
        return ExitCode.BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; what is still buffered has no place to go
        return ExitCode.FAILURE
    except Exception as error:
        if os.environ.get("AUTOEFF_DEBUG") == "1":
            traceback.print_exc()
        print_error(f"{type(error).__name__}: {error}; this is a fault of autoeff, {_logged()}")
        return ExitCode.FAILURE
    return code if isinstance(code, int) else ExitCode.FEASIBLE


@contextmanager
def _source(ctx: typer.Context) -> Iterator[Source]:
    """Where the verb gets what it prints; each verb that can do so elsewhere asks for it."""
    if ctx.obj is None:
        yield Local()
    else:
        with _server(ctx) as server:
            yield server


@contextmanager
def _server(ctx: typer.Context) -> Iterator[Remote]:
    """The server that was named."""
    key = os.environ.get("AUTOEFF_KEY")
    if not key:
        raise InputError(f"the server at {ctx.obj} wants a key: set AUTOEFF_KEY to one that `autoeff serve` or `autoeff keys create` gave")
    with autoeff.Client(ctx.obj, key) as client:
        yield Remote(client)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Ctrl-C ends a search with a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        how = f"; `autoeff resume {folder}` goes on" if folder.exists() else ""
        sys.stderr.write(f"\nautoeff: interrupted{how}\n")
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _print_status(facts: Mapping[str, Any], form: Form) -> None:
    if form is Form.JSON:
        print_json(facts)
        return
    print_pairs({name: "-" if value is None else ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()})


def _print_jobs(rows: Sequence[Mapping[str, Any]], form: Form) -> None:
    if form is Form.JSON:
        print_json(rows)
        return
    columns = ["job", "state", "model", "limits", "trials", "used", "budget", "created"]
    print_table(columns, [[", ".join(r[c]) if c == "limits" else r[c] for c in columns] for r in rows], left=4)
    if not rows:
        sys.stderr.write("autoeff: no jobs yet; `autoeff search demo` makes the first\n")


def _print_trial(shown: Shown, form: Form) -> None:
    row = shown.row
    if form is Form.JSON:
        print_json(row)
        return
    print_pairs({key: row[key] for key in ("trial", "digest", "origin", "label", "state") if row.get(key) is not None})
    sys.stdout.write("\n")
    columns = ["measurement", "value", "spread", "text", "tokens", "method"]
    measured = row["measurements"].items()
    print_table(
        columns,
        [
            [
                n,
                described(n).text(m["value"]),
                f"{m['spread']:.2g}" if "spread" in m else None,
                m.get("split"),
                m.get("tokens"),
                m.get("method"),
            ]
            for n, m in measured
        ],
    )
    sys.stdout.write("\n")
    print_table(["decision", "level"], row["configuration"].items())
    if "facts" in row:
        sys.stdout.write("\n")
        print_pairs(row["facts"])
    if "failure" in row:
        sys.stdout.write(f"\n{row['failure']['class']}: {row['failure']['message']}\n")
        sys.stdout.writelines(f"\nlog of attempt {n}:\n{log}\n" for n, log in enumerate(shown.logs, start=1) if log)


def _print_rows(listing: Listing, form: Form) -> None:
    rows = listing.rows
    if form is Form.JSON:
        print_json(rows)
        return
    columns = {**listing.columns, **{name: name for name in _HELD_OUT if any(name in row["measurements"] for row in rows)}}
    print_table(
        ["trial", "origin", "label", "state", *columns.values()],
        [
            [
                r["trial"],
                r["origin"],
                r.get("label"),
                r["failure"]["class"] if "failure" in r else r["state"],
                *(_shown(r, n) for n in columns),
            ]
            for r in rows
        ],
        left=4,
    )


def _shown(row: Mapping[str, Any], name: str) -> str | None:
    return described(name).text(row["measurements"][name]["value"]) if name in row["measurements"] else None


_HELD_OUT = [name for name in MEASURES if name.endswith("_held_out")]


def _print_plan(facts: Mapping[str, Any], form: Form) -> None:
    from autoeff.search.job import JobSpec
    from autoeff.search.standing import TABLE_WORDS

    if form is Form.JSON:
        print_json(facts)
        return
    preflight, seconds = facts["preflight"], facts["seconds"]
    model = preflight["model"]
    texts = {
        f"{split.replace('_', '-')} text": f"{text['source']}: {text['windows']} x {text['length']} tokens"
        for split, text in preflight["text"].items()
    }
    print_pairs(
        {
            "model": f"{model['path']} ({model['model_type']}, {model['blocks']} blocks, context {model['context']})",
            "parameters": f"{model['parameters']:,}",
            **texts,
            "quality": preflight["quality"],
            "decisions": preflight["decisions"],
            "configurations": _magnitude(preflight["configurations"]),
            "memory needed": f"{_size(preflight['memory_bytes'])} of the {_size(facts['memory_cap_bytes'])} that are allowed",
            "level bank": f"{_size(preflight['bank_bytes'])}, {_size(preflight['bank_missing_bytes'])} of them to be built",
            "time": f"about {_duration(seconds['bank'])} for the bank, {_duration(seconds['evaluation'])} an evaluation, "
            f"at most {_duration(seconds['search'])} in all",
            "hardware": preflight["hardware"],
            "damage table": TABLE_WORDS[facts["table"]],
            "least --trials": facts["minimum_trials"],
            "left to search": f"{facts['left_to_search']} of {facts['job']['budget']['trials']} evaluations",
        }
    )
    sys.stdout.write("\n")
    bounds = {limit["name"]: limit["text"] for limit in facts["limits"]}
    print_table(
        ["cost", "dense", "least reachable", "of dense", "limit"],
        [
            [
                name if (method := facts["methods"][name]) == "exact" else f"{name} ({method})",
                described(name).text(dense),
                described(name).text(facts["least"][name]),
                _share(facts["least"][name], dense),
                bounds.get(name),
            ]
            for name, dense in facts["dense"].items()
        ],
    )
    sys.stdout.write(f"\n{JobSpec.parse(facts['job']).to_yaml()}")
    for notice in preflight["notices"]:
        sys.stderr.write(f"autoeff: notice: {notice}\n")


def _share(value: float, dense: float) -> str:
    """In the form of a limit, rounded up so that it is one that can be kept."""
    return f"{math.ceil(value / dense * 10**4) / 10**4:.4f}x" if dense else ""


def _size(size: float) -> str:
    return MEASURES["weight_bytes"].text(size)


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _magnitude(number: str) -> str:
    return number if len(number) <= 9 else f"about 10^{len(number) - 1}"


def _print_result(job_id: str, folder: Path, exit_code: int, summary: Mapping[str, Any], columns: Mapping[str, Any], form: Form) -> None:
    """The end table; `columns` are those of `search.facts.columns_of`."""
    paths = {"front": folder / "front.png", "report": folder / "report.html"}
    if form is Form.JSON:
        files = {f"{name}_file": str(path) for name, path in paths.items()}
        print_json({"job": job_id, "folder": str(folder), "exit_code": exit_code, **files, **summary})
        return
    from autoeff.search.report import verdict
    from autoeff.tables import print_attribution, print_from_scratch, print_latency

    rows, quality, costs = summary["rows"], summary["quality"], columns["columns"]
    confirmed = ("perplexity_held_out", "spearman_held_out", "passkey_accuracy")
    held_out = {f"{quality}_held_out": "held_out"} | {name: name for name in confirmed}
    held_out = {name: key for name, key in held_out.items() if any(row.get(key) is not None for row in rows)}
    held_out |= {name: name for row in rows for name in row if name.startswith("accuracy:")}
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics", ())))
    print_table(
        ["", "label", "trial", *costs.values(), quality, *held_out, *metrics],
        [
            [
                row["role"], row["label"] or row["point"], row["trial"], *(described(name).text(row["costs"][name]) for name in costs),
                *(described(n).text(row[key]) if row.get(key) is not None else None for n, key in {quality: "search", **held_out}.items()),
                *(described(name).text(row["metrics"][name]) if name in row["metrics"] else None for name in metrics),
            ]
            for row in rows
        ],
        left=2,
    )  # fmt: skip
    sys.stdout.write("\n")
    for row in rows:
        if row["role"] == "found":
            sys.stdout.write(f"{verdict(row, summary, columns['judged_cost'], costs)}\n")
    if summary.get("latency"):
        sys.stdout.write("\n")
        print_latency(summary["latency"])
    if summary.get("from_scratch"):
        sys.stdout.write("\n")
        print_from_scratch(summary["from_scratch"])
    if summary.get("attribution"):
        sys.stdout.write("\n")
        print_attribution(summary["attribution"], quality)
    print_pairs(paths)


def _print_run(result: Result, form: Form) -> None:
    from autoeff.search.facts import columns_of

    with opened(str(result.folder)) as run:
        columns = columns_of(run.store.job(run.job_id))
    _print_result(result.job_id, result.folder, result.exit_code, result.summary, columns, form)


def _search_there(source: Remote, spec: JobSpec, out: Path | None, form: Form, *, dry_run: bool) -> None:
    from autoeff.search.run import default_folder
    from autoeff.search.runs import check_new

    if dry_run:
        _print_plan(source.plan(spec), form)
        return
    folder = default_folder(spec.model) if out is None else out
    check_new(folder)
    _follow_there(source, source.submit(spec, folder), folder, form)


def _follow_there(source: Remote, job_id: str, folder: Path, form: Form) -> None:
    """Watches a job of a server to its end, and prints and fetches what it found."""
    try:
        with Watcher() as watcher:
            finished = source.follow(job_id, folder, watcher.watch)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"\nautoeff: the search goes on without you; `autoeff --server {source.client.server} resume {folder}` watches it\n"
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    _print_result(job_id, folder, finished.exit_code, finished.summary, finished.columns, form)
    raise typer.Exit(finished.exit_code)


def _logged() -> str:
    """Where the traceback was written."""
    name = f"autoeff-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (Path(os.environ.get("AUTOEFF_HOME", tempfile.gettempdir())), Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text(traceback.format_exc())
        except OSError:
            continue
        return f"its traceback is in {folder / name}"
    return "AUTOEFF_DEBUG=1 shows its traceback"


if __name__ == "__main__":
    sys.exit(main())
