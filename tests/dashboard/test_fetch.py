"""What is asked of a server."""

from __future__ import annotations

from typing import Any

from autoeff.dashboard.fetch import snapshot


def test_what_has_not_changed_is_not_asked_for_again(client: Any, shown: Any, plant: Any) -> None:
    assert snapshot(client, plant.job, shown) is shown
    older = shown.job.model_copy(update={"events": shown.job.events - 1})
    assert client.job(plant.job, older) == shown.job
