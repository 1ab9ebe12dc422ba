"""The Celery application from outside; its workers are started and asked in `test_service.py`."""

from __future__ import annotations

from typing import Any

import pytest
from celery.app.utils import find_app

from autoeff.search.celery_app import app, sender
from autoeff.search.storage import Message


def test_celery_finds_the_application_by_the_name_of_its_module() -> None:
    assert find_app("autoeff.search.celery_app") is app
    assert "autoeff.evaluate" in app.tasks


def test_messages_are_dropped_while_the_broker_is_away(servers: Any, caplog: pytest.LogCaptureFixture) -> None:
    away = f"redis://127.0.0.1:{servers.free_port()}/0"
    sender(away)([Message(1, "cpu", 0)])
    assert "the broker is away" in caplog.text
