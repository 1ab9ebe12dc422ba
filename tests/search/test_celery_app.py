"""A Celery worker started as Celery starts them: what it reserves, and what it does with messages that nobody should send."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from autoeff.search.celery_app import app, sender
from autoeff.search.settings import Settings
from autoeff.search.storage import Message, Store


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 90
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def settings(redis: Any, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, broker_url=redis.url, lease_s=60)


@pytest.fixture
def broker(settings: Settings) -> Iterator[Celery]:
    """Talks to the same workers as the application, from outside."""
    with Celery(broker=settings.broker_url) as outside:
        outside.conf.broker_transport_options = app.conf.broker_transport_options
        yield outside


@pytest.fixture
def worker(settings: Settings, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    Store.open(settings.database).close()
    variables = {"AUTOEFF_HOME": str(tmp_path), "AUTOEFF_BROKER_URL": str(settings.broker_url), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "celery", "-A", "autoeff.search.celery_app", "worker", "-Q", "cpu", "-l", "INFO"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
    yield process
    process.terminate()
    process.wait(60)


def waiting(settings: Settings) -> int:
    with Redis.from_url(str(settings.broker_url)) as client:
        return int(client.llen("autoeff:cpu"))


@pytest.mark.timeout(300)
def test_a_worker_reserves_nothing_and_survives_messages_that_nobody_should_send(
    worker: subprocess.Popen[bytes], broker: Celery, settings: Settings, tmp_path: Path
) -> None:
    with Store.open(settings.database) as store:
        until(lambda: [w.alive for w in store.workers()] == [True], "the worker did not announce itself")
        (announced,) = store.workers()
    assert (announced.queues, announced.kind) == (["cpu"], "cpu")
    assert settings.broker_url is not None
    send = sender(settings.broker_url)
    with closing(sqlite3.connect(settings.home / "autoeff.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # so that the first task waits while it claims
        send([Message(evaluation_id, "cpu", 0) for evaluation_id in range(1, 7)])
        until(lambda: waiting(settings) == 5, "one message should be taken")
        time.sleep(0.5)
        assert waiting(settings) == 5
        assert list(broker.control.inspect(timeout=2).reserved().values()) == [[]]
        other.rollback()
    for wrong in (["autoeff"], [None], [True], [], [1, 2]):
        broker.send_task("autoeff.evaluate", wrong, queue="cpu", ignore_result=True)
    broker.send_task("os.system", ["true"], queue="cpu", ignore_result=True)
    broker.send_task("autoeff.evaluate", [1], queue="cpu", serializer="pickle", ignore_result=True)
    until(lambda: waiting(settings) == 0, "a message was not taken")
    send([Message(7, "cpu", 0)])
    until(lambda: (tmp_path / "log").read_text().count("succeeded in") >= 10, "the worker takes messages no more")
    log = (tmp_path / "log").read_text()
    assert log.count("no evaluation:") == 3
    assert "Refusing to deserialize" in log
    assert "unregistered task" in log
    assert worker.poll() is None


def test_messages_are_dropped_while_the_broker_is_away(servers: Any, caplog: pytest.LogCaptureFixture) -> None:
    away = f"redis://127.0.0.1:{servers.free_port()}/0"
    sender(away)([Message(1, "cpu", 0)])
    assert "the broker is away" in caplog.text
