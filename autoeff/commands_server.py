"""The verbs of a server: `serve`, `keys`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autoeff.console import print_json, print_pairs, print_table

if TYPE_CHECKING:
    from autoeff.search.storage.keys import KeyRing

__all__ = ["keys", "serve"]

_SCOPES = "jobs:read,jobs:write"
_Format = Annotated[Literal["table", "json"], typer.Option("--format", help="How to print.")]

keys = typer.Typer(name="keys", help="Makes and ends the keys of the server on this machine's database.", no_args_is_help=True)


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; anything but this machine's own needs a key made before.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 chooses a free one.", min=0, max=65535)] = 8423,
    with_worker: Annotated[bool, typer.Option("--with-worker", help="Evaluate on this machine too.")] = False,
    queues: Annotated[str, typer.Option(help="Of that worker: cpu, gpu.any and gpu.KIND.", metavar="NAME,NAME…")] = "cpu",
    with_dashboard: Annotated[bool, typer.Option("--with-dashboard", help="Serve the dashboard of this server too.")] = False,
    dashboard_port: Annotated[int, typer.Option(help="Of that dashboard.", min=1, max=65535)] = 8501,
    with_coordinator: Annotated[bool, typer.Option("--coordinator/--no-coordinator", help="Drive the submitted jobs from here.")] = True,
    models: Annotated[list[Path] | None, typer.Option(help="Folder whose models jobs may name; may be repeated.", metavar="DIR")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Folder whose texts jobs may name; may be repeated.", metavar="DIR")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Let jobs name models and texts of the hub.")] = False,
) -> None:
    """Serves the REST API, and drives what is submitted to it."""
    # Through the environment, so that the processes beside this one find the same.
    for name, folders in (("AUTOEFF_MODEL_ROOTS", models), ("AUTOEFF_DATA_ROOTS", data)):
        if folders:
            os.environ[name] = ":".join(str(folder.absolute()) for folder in folders)
    if hub:
        os.environ["AUTOEFF_HUB"] = "1"
    from autoeff.api.server import run
    from autoeff.search.settings import Settings

    helpers = [["coordinator"]] if with_coordinator else []
    if with_worker:
        helpers.append(["worker", "--queues", queues])

    def told(url: str, key: str | None) -> None:
        _say_where(url, key)
        if with_dashboard:  # it asks for a key, or takes AUTOEFF_KEY
            helpers.append(["dashboard", "--server", url, "--host", host, "--port", str(dashboard_port)])

    run(Settings.read(), host, port, helpers, told)


@keys.command()
def create(
    name: Annotated[str, typer.Option(help="For people.")],
    owner: Annotated[str, typer.Option(help="Whose jobs it sees.")],
    scopes: Annotated[str, typer.Option(help="Of jobs:read, jobs:write and admin.", metavar="NAME,NAME…")] = _SCOPES,
    days: Annotated[int | None, typer.Option(help="After which it ends; default never.", min=1, max=3650)] = None,
) -> None:
    """Makes a key and prints it, this once."""
    with _ring() as ring:
        key, minted = ring.make(name, owner, [scope.strip() for scope in scopes.split(",")], days)
    sys.stderr.write(f"autoeff: key {key.prefix} of {key.owner}, {', '.join(key.scopes)}; it is not shown again\n")
    sys.stdout.write(f"{minted.text}\n")


@keys.command()
def ls(form: _Format = "table") -> None:
    """Lists every key, without its secret."""
    with _ring() as ring:
        rows = [key.to_json() for key in ring.all()]
    if form == "json":
        print_json(rows)
        return
    columns = ["key", "name", "owner", "scopes", "created", "expires", "revoked", "last_used"]
    print_table(columns, [[", ".join(row[c]) if c == "scopes" else row[c] for c in columns] for row in rows], left=len(columns))


@keys.command()
def revoke(key: Annotated[str, typer.Argument(metavar="KEY", help="The eight digits after ae_.")]) -> None:
    """Ends a key for ever; servers hear of it within seconds."""
    with _ring() as ring:
        print_pairs({"revoked": ring.revoke(key).prefix})


@contextmanager
def _ring() -> Iterator[KeyRing]:
    from autoeff.search.settings import Settings
    from autoeff.search.storage.keys import KeyRing
    from autoeff.search.storage.store import Store

    with Store.open(Settings.read().database) as store:
        yield KeyRing(store.database)


def _say_where(url: str, key: str | None) -> None:
    if key is not None:
        sys.stdout.write(f"export AUTOEFF_KEY={key}\n")
        sys.stderr.write("autoeff: this is the first admin key; it is not shown again\n")
    sys.stdout.write(f"export AUTOEFF_SERVER={url}\n")
    sys.stdout.flush()
    sys.stderr.write(f"autoeff: serving at {url}; Ctrl-C ends it\n")
