"""The verbs of a service: `worker`, `coordinator`, `db upgrade`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from autoeff.errors import InputError

if TYPE_CHECKING:
    from autoeff.search.settings import Settings

__all__ = ["coordinator", "database", "worker"]

_Broker = Annotated[str | None, typer.Option(help="redis://… of Celery; default AUTOEFF_BROKER_URL.", show_default=False)]
_Database = Annotated[str | None, typer.Option("--database", help="URL; default AUTOEFF_DATABASE_URL.", show_default=False)]

database = typer.Typer(name="db", help="Looks after the database.", no_args_is_help=True)


def worker(
    queues: Annotated[str, typer.Option(help="Of cpu, gpu.any and gpu.KIND.", metavar="NAME,NAME…")] = "cpu",
    broker: _Broker = None,
    database_url: _Database = None,
) -> None:
    """Evaluates for submitted jobs: a Celery worker where there is a broker, else a loop over the database."""
    settings = _settings(broker, database_url)
    from autoeff.search.station import Station, check_queues

    names = [name.strip() for name in queues.split(",") if name.strip()]
    check_queues(names)
    if settings.broker_url is not None:
        from autoeff.search.celery_app import app

        name = f"autoeff-{os.getpid()}@%h"
        app.worker_main(["worker", "-Q", ",".join(names), "-n", name, "-l", "INFO", "--without-gossip", "--without-mingle"])
        return
    station = Station(settings, names)
    _until_signal(station.stop)
    station.open()
    try:
        station.run()
    finally:
        station.close()


def coordinator(broker: _Broker = None, database_url: _Database = None) -> None:
    """Drives submitted jobs, sends their evaluations to workers, and sees to what was lost; `autoeff serve` does so, too."""
    settings = _settings(broker, database_url)
    from autoeff.search.service import run_coordinators

    stop = threading.Event()
    _until_signal(stop.set)
    run_coordinators(settings, stop)


@database.command()
def upgrade(database_url: _Database = None) -> None:
    """Brings the database to the revision of this version, after a copy of it was made where it is a file."""
    settings = _settings(None, database_url)
    from contextlib import closing

    from autoeff.search.storage.database import Database
    from autoeff.search.storage.tables import REVISION

    with closing(Database(settings.database, upgrade=True)) as opened:
        before = opened.upgraded_from
        done = "made" if before is None else "is up to date" if before == REVISION else f"was upgraded from {before}"
        sys.stdout.write(f"{opened.name} {done}: revision {REVISION}\n")


def _settings(broker: str | None, database_url: str | None) -> Settings:
    from autoeff.search.settings import Settings

    # Through the environment, so that processes started from here find the same.
    for name, value in (("AUTOEFF_BROKER_URL", broker), ("AUTOEFF_DATABASE_URL", database_url)):
        if value is not None:
            os.environ[name] = value
    settings = Settings.read()
    if settings.broker_url is not None and not settings.broker_url.startswith(("redis://", "rediss://", "unix://")):
        raise InputError(f"broker {settings.broker_url.split('@')[-1]!r} is not supported; write for example redis://127.0.0.1:6379/0")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return settings


def _until_signal(stop: Callable[[], None]) -> None:
    def told(*_: object) -> None:
        # In a thread: the main one may have been interrupted inside `Event.wait`, holding the lock that `Event.set` takes.
        threading.Thread(target=stop, name="stop").start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
