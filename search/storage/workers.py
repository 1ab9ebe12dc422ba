"""Workers: who takes evaluations of which queues, and who is alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, insert, or_, select, update

from autoeff.search.storage.database import insert_absent
from autoeff.search.storage.holders import holder_is_dead
from autoeff.search.storage.jobs import Jobs
from autoeff.search.storage.records import State, WorkerInfo
from autoeff.search.storage.rows import written
from autoeff.search.storage.tables import EvaluationRow, HardwareRow, WorkerRow, now
from autoeff.spaces.configuration import digest_of

__all__ = ["Workers"]

_FORGOTTEN_S = 86_400.0  # a worker that has not been seen for this long


class Workers(Jobs):
    """The workers of a database."""

    def announce_worker(self, worker: str, queues: Sequence[str], kind: str, facts: Mapping[str, Any], ttl_s: float) -> None:
        """Notes that a worker takes evaluations of these queues, for `ttl_s` seconds unless it is seen again.

        Args:
            worker: From `process_identity`.
            queues: That it listens to.
            kind: Of its device, as in `gpu.KIND`.
            facts: What else is to be known of its machine; equal facts are one row.
            ttl_s: As above.
        """
        fingerprint = digest_of([kind, facts])
        row = {"id": worker, "queues": list(queues), "started_at": now(), "seen_until": now() + ttl_s}
        with self._database.write() as connection:
            insert_absent(connection, HardwareRow, {"fingerprint": fingerprint, "kind": kind, "facts": dict(facts)}, stamped="created_at")
            hardware = select(HardwareRow.id).where(HardwareRow.fingerprint == fingerprint).scalar_subquery()
            connection.execute(delete(WorkerRow).where(or_(WorkerRow.id == worker, WorkerRow.seen_until < now() - _FORGOTTEN_S)))
            connection.execute(insert(WorkerRow).values(hardware_id=hardware, **row))

    def worker_seen(self, worker: str, ttl_s: float) -> None:
        """Notes that the worker is alive; with `ttl_s` 0, that it has ended."""
        with self._database.write() as connection:
            connection.execute(update(WorkerRow).where(WorkerRow.id == worker).values(seen_until=now() + ttl_s))

    def workers(self) -> list[WorkerInfo]:
        """Workers of the last day, the newest first."""
        alive = (WorkerRow.seen_until > now()).label("alive")
        columns = WorkerRow.id, WorkerRow.queues, HardwareRow.kind, HardwareRow.facts, WorkerRow.started_at, WorkerRow.seen_until, alive
        query = select(*columns).join(HardwareRow, HardwareRow.id == WorkerRow.hardware_id).order_by(WorkerRow.started_at.desc())
        busy = select(EvaluationRow.worker, EvaluationRow.id).where(EvaluationRow.state == written(State.RUNNING))
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            at = {row.worker: row.id for row in connection.execute(busy)}
        return [
            WorkerInfo(
                id=row.id,
                queues=row.queues,
                kind=row.kind,
                facts=row.facts,
                started_at=row.started_at,
                seen_until=row.seen_until,
                alive=row.alive and not holder_is_dead(row.id),
                evaluation_id=at.get(row.id),
            )
            for row in rows
        ]
