"""Celery over Redis, the way to workers on other machines: `celery -A autoeff.search.celery_app worker -Q cpu`, or `autoeff worker`.

A message names an evaluation and no more. It may be lost, repeated or late: the claim in the database decides who works at what, and the
outbox sends again what nobody claimed. So messages are acknowledged before the work is done; with late acknowledgement Redis would give
what takes longer than its visibility timeout to a second worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from multiprocessing.sharedctypes import RawValue
from typing import Any

from celery import Celery
from celery.signals import celeryd_after_setup, worker_init, worker_process_init, worker_process_shutdown, worker_shutting_down
from kombu.exceptions import OperationalError

from autoeff.search.runner_process import prestart
from autoeff.search.settings import Settings
from autoeff.search.station import QUEUE, Station
from autoeff.search.storage.records import Message

__all__ = ["app", "evaluate", "sender"]

_log = logging.getLogger(__name__)

app = Celery("autoeff")
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_default_queue=QUEUE,
    task_acks_late=False,  # the lease, not the acknowledgement, is the claim
    task_reject_on_worker_lost=False,  # Redis counts no redeliveries: a task that kills its worker would do so for ever
    worker_disable_prefetch=True,  # one evaluation may take hours: nothing is reserved behind it
    worker_prefetch_multiplier=1,
    worker_concurrency=1,  # one process for each device
    worker_pool="prefork",  # with solo, a long task stays unacknowledged and remote control is deaf
    worker_proc_alive_timeout=60.0,
    worker_soft_shutdown_timeout=20.0,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "visibility_timeout": 3600,
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "retry_on_timeout": True,
        "global_keyprefix": "autoeff:",
    },
    worker_send_task_events=True,
    worker_hijack_root_logger=False,
)
if (_broker := Settings.read().broker_url) is not None:
    app.conf.broker_url = _broker

_station: Station | None = None
"""Of this process of the pool; made after the fork."""
_leaving: Any = None
"""Shared by the worker and its pool: 1 once the worker was asked to end. It has no lock that a killed process could keep."""


@worker_init.connect  # type: ignore[untyped-decorator]
def _begin(**_: Any) -> None:
    global _leaving
    _leaving = RawValue("b", 0)


@celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _prepare(**_: Any) -> None:
    """Before the pool is forked, whose processes share what this one has; one that was killed is replaced soon."""
    if QUEUE in app.amqp.queues.consume_from:
        prestart("cpu")


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _leave(**_: Any) -> None:
    _leaving.value = 1


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _open(**_: Any) -> None:
    global _station
    _station = Station(Settings.read(), list(app.amqp.queues.consume_from), lambda: bool(_leaving.value))
    _station.open()


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _close(**_: Any) -> None:
    if _station is not None:
        _station.close()


@app.task(name="autoeff.evaluate")  # type: ignore[untyped-decorator]
def evaluate(evaluation_id: int) -> None:
    """Does an evaluation, this one or one that comes before it, if any is there to be done."""
    if _station is None or type(evaluation_id) is not int:
        _log.warning("no evaluation: %.80r", evaluation_id)
        return
    _station.evaluate(evaluation_id)


def sender(broker_url: str) -> Callable[[Sequence[Message]], None]:
    """What sends messages to the workers of this broker; while it is away they are dropped, and come again."""

    def send(messages: Sequence[Message]) -> None:
        try:
            with app.connection_for_write(broker_url) as connection:
                for message in messages:
                    evaluate.apply_async((message.evaluation_id,), queue=message.queue, connection=connection, retry=False)
        except OperationalError as error:
            _log.warning("the broker is away: %s", error)

    return send
