"""Figures of the whole plant, for those who watch it: counted in the database, never row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import func, select

from autoeff.search.storage.database import Database
from autoeff.search.storage.records import JobState
from autoeff.search.storage.tables import EvaluationRow, JobRow, OutboxRow, now

__all__ = ["Plant", "Queue"]


class Queue(NamedTuple):
    """Evaluations that wait for a worker, and the age of the oldest in seconds."""

    waiting: int
    oldest_s: float


class Plant:
    """Counts what a database holds.

    Args:
        database: Open; whoever opened it closes it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def jobs(self) -> Mapping[JobState, int]:
        """Jobs by state."""
        with self._database.read() as connection:
            rows = connection.execute(select(JobRow.state, func.count()).group_by(JobRow.state)).all()
        return dict.fromkeys(JobState, 0) | {row[0]: row[1] for row in rows}

    def queues(self) -> Mapping[str, Queue]:
        """What waits for workers, by queue."""
        age = func.max(now() - EvaluationRow.created_at)
        query = select(OutboxRow.queue, func.count(), age).join(EvaluationRow, EvaluationRow.id == OutboxRow.evaluation_id)
        with self._database.read() as connection:
            rows = connection.execute(query.group_by(OutboxRow.queue)).all()
        return {queue: Queue(number, _seconds(oldest)) for queue, number, oldest in rows}


def _seconds(age: object) -> float:
    """Of a difference of instants, which the column's type reads as a point in time."""
    return float(getattr(age, "timestamp", lambda: age)() or 0.0)  # type: ignore[arg-type]
